"""A step on a pretended GPU: what it counts, and that it stays there."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from elmwood.records import Recipe
from elmwood.train.fit.allocator import CachingAllocator
from elmwood.train.fit.formulas import anatomy, components
from elmwood.train.fit.predict import fit

LLAMA = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64, "dropout": 0.0}
CONFIGS = {"llama": LLAMA, "qwen3": LLAMA | {"head_dim": 16}, "gpt2": GPT2, "opt": OPT}
ENDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
RECIPE = Recipe(steps=2, batch=4, length=256, rank=4)


def config(kind: str):
    return transformers.AutoConfig.for_model(kind, **CONFIGS[kind] | ENDS)


METHODS = ("full", "lora", "qlora")
LORA = RECIPE.model_copy(update={"method": "lora"})


REHEARSE = """
import sys
from pathlib import Path
from elmwood.train.fit.rehearsal import main
main(sys.stdin.read().splitlines(), Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def rehearsals(forked, tmp_path_factory):
    """All of them in one process."""
    folder = tmp_path_factory.mktemp("rehearsals")
    runs = {(kind, method): (config(kind), RECIPE.model_copy(update={"method": method})) for kind in CONFIGS for method in METHODS}
    runs["lora", "checkpointing"] = config("llama"), LORA.model_copy(update={"checkpointing": True})
    runs["full", "8 bits"] = config("llama"), RECIPE.model_copy(update={"optimiser": "adamw8bit"})
    runs["a model that", "raises"] = SimpleNamespace(to_dict=lambda: {"model_type": "nobody"}), RECIPE
    lines = [json.dumps([config.to_dict(), recipe.model_dump(mode="json")]) for config, recipe in runs.values()]
    done = forked(REHEARSE, str(folder / "found"), cwd=folder, stdin="\n".join(lines))
    assert not done.returncode, done.stderr
    return dict(zip(runs, map(json.loads, (folder / "found").read_text().splitlines()), strict=True))


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("method", METHODS)
def test_a_rehearsal_counts_what_the_formulas_count(kind, method, rehearsals):
    """The formulas' tensors were held against real models. The rest of a peak comes and goes within a layer."""
    found, said = rehearsals[kind, method], components(anatomy(config(kind)), RECIPE.model_copy(update={"method": method}), "cuda")
    copies = 2 * anatomy(config(kind)).matrices if method == "full" else 0  # autocast's come and go here
    assert 0 <= found["weights"] - (said["weights"] - copies) < 300_000  # each tensor is rounded up to 512 bytes
    assert 0 <= found["optimiser"] - said["optimiser"] < 300_000
    kept = said["activations"] + said["gradients"] + said["logits"] + copies
    assert 0.8 * kept < found["activations and gradients"] < 1.5 * kept


def test_checkpointing_and_fewer_bits_take_less(rehearsals):
    total = {run: sum(found.values()) for run, found in rehearsals.items() if found}
    assert total["lora", "checkpointing"] < total["llama", "lora"] < total["llama", "full"]
    assert total["full", "8 bits"] < total["llama", "full"]


def test_fit_rehearses_for_a_gpu(tmp_path, rehearsals):
    config("llama").save_pretrained(tmp_path)
    answer = fit(str(tmp_path), LORA, device="cuda", memory=8 * 10**9)
    assert answer.components == rehearsals["llama", "lora"]
    assert answer.fits
    assert rehearsals["a model that", "raises"] is None
    together = fit(str(tmp_path), LORA.model_copy(update={"together": 2}), device="cuda", memory=8 * 10**9)
    assert "activations" in together.components  # by the formulas


def test_a_step_stays_on_the_device(forked):
    rewritten = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that were imported before
    words = ["-q", "-n", "0", "-p", "no:cacheprovider", *rewritten, "pretended_gpu.py"]
    done = forked("import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", *words, cwd=Path(__file__).parent)
    assert not done.returncode, done.stdout


# ---- the allocator --------------------------------------------------------------------------------------------------


def test_segments_are_those_of_the_documented_sizes():
    """A small block's segment has 2 MB, a medium one's 20 MB, larger ones have their own."""
    for size, segment in ((1, 2 << 20), (1 << 20, 2 << 20), ((1 << 20) + 1, 20 << 20), ((10 << 20) + 1, 12 << 20)):
        allocator = CachingAllocator()
        allocator.allocate(size)
        assert allocator.reserved == segment
        allocator.allocate(size)
        assert allocator.reserved == (segment if size <= 8 << 20 else 2 * segment)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40 << 20)), max_size=60))
def test_what_was_freed_is_used_again_and_blocks_join(steps):
    allocator, held = CachingAllocator(), []
    for which, size in steps:
        if which < len(held):
            allocator.free(held.pop(which))
        else:
            held.append(allocator.allocate(size))
        assert allocator.allocated <= allocator.most <= allocator.reserved
    for number in held:
        allocator.free(number)
    assert allocator.allocated == 0
    segments = sum(block.size for block in allocator._blocks.values())
    assert segments == allocator.reserved
    assert all(block.before is None and block.after is None for block in allocator._blocks.values())  # whole segments again
