"""What others wrote into a model's files: nothing of it runs, goes online, takes the machine's memory, or is made up."""

import json
import resource
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_configs import some_tokens
from tiny_models import SHAPE, config_seed, lora_expert, tiny_seed
from transformers import GPT2Config, MixtralConfig
from transformers.integrations import hub_kernels

from elmwood.errors import BadInput, BadSeed, Damaged, UnknownName
from elmwood.lm.checkpoint import said
from elmwood.lm.experts import Experts
from elmwood.lm.files import download, seed_folder, tokenizer
from elmwood.lm.load import end_tokens, import_seed, load_model, own_generation
from elmwood.lm.pretrained import make_config
from elmwood.records import Expert, Recipe, Seed
from elmwood.store import Store
from elmwood.study import fitting
from elmwood.train.adopt import import_adapter
from elmwood.train.fit.predict import load_config


def changed(seed: Seed, store: Store, **files: object) -> Seed:
    """The record that a stranger could send: the same seed with other files. `config`: settings beside its own."""
    kept = dict(seed.files)
    for name, content in files.items():
        if name == "config":
            content = json.dumps(json.loads(store.get(kept["config.json"]).read_text()) | content)
        kept[{"config": "config.json", "weights": "model.safetensors"}.get(name, name)] = store.put(
            content if isinstance(content, Path | bytes) else content.encode()
        )
    made = seed.model_copy(update={"files": kept})
    store.add(made)
    return made


# ---- sizes -------------------------------------------------------------------------------------------------------

GPT2 = GPT2Config(vocab_size=SHAPE.vocabulary, n_embd=32, n_layer=1, n_head=2, n_positions=64)
MIXTRAL = MixtralConfig(
    vocab_size=SHAPE.vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=2, max_position_embeddings=64,
)  # fmt: skip
BOMBS = {
    "layers": (None, {"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000"),
    "layers without end": (None, {"num_hidden_layers": 10**18}, "num_hidden_layers"),
    "more layers than files": (None, {"num_hidden_layers": 300}, "num_hidden_layers = 300"),
    "vocabulary": (None, {"vocab_size": 10**9}, "parameters"),
    "width": (None, {"hidden_size": 10**8, "head_dim": 16}, "parameters"),
    "width that no tensor can have": (None, {"hidden_size": 10**12, "head_dim": 16}, "config"),
    "feed-forward": (None, {"intermediate_size": 10**9}, "parameters"),
    "heads": (None, {"num_attention_heads": 10**8, "head_dim": 4}, "num_attention_heads"),
    "layers by another name": (GPT2, {"n_layer": 10**7}, "n_layer = 10000000"),
    "masks": (GPT2, {"n_positions": 10**6}, "constants|parameters"),
    "experts": (MIXTRAL, {"num_local_experts": 10**7}, "num_local_experts = 10000000"),
    "a config inside": (None, {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers = 10000000"),
    "a list of counts": (None, {"model_type": "openelm", "num_layers": [4, 10**7]}, "num_layers = 10000000"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_config_that_speaks_of_more_than_its_files_hold_is_refused_before_a_model_is_built(kind, store, tmp_path):
    config, settings, complaint = BOMBS[kind]
    plain = tiny_seed(store) if config is None else config_seed(config, store)
    seed = changed(plain, store, config=settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = Expert(seed=plain.digest, data=(), recipe=Recipe(method="full", steps=1), files=seed.files)
    for use in (
        lambda: load_model(seed, store, device="cpu"), lambda: load_model(plain, store, whole, "cpu"),
        lambda: import_seed(str(seed_folder(seed, store)), Store(tmp_path / "other")),
    ):  # fmt: skip
        with pytest.raises(BadSeed, match=complaint):
            use()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_an_adapter_is_not_held_against_a_bomb(store, tmp_path):
    plain = tiny_seed(store)
    folder = store.folder(lora_expert(plain, store, 1).files)
    with pytest.raises(BadSeed, match="num_hidden_layers"):
        import_adapter(str(folder), changed(plain, store, config={"num_hidden_layers": 2000}), store)
    with pytest.raises(BadSeed, match="num_hidden_layers"):
        make_config({"model_type": "llama", "num_hidden_layers": 10**7})


def test_what_transformers_says_of_a_copy_is_said_of_the_folder_that_was_given():
    with pytest.raises(BadSeed, match=r"^here: .*Unrecognized model in here\. "):
        make_config({}, "here")


# ---- code, kernels, other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nobody", "llama"])
def test_code_of_others_never_runs_and_nobody_is_asked(kind, store, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Words", "evil.Words"]}
    plain = tiny_seed(store)
    words = json.dumps({"auto_map": auto, "tokenizer_class": "Words"})
    seed = changed(plain, store, config={"model_type": kind, "auto_map": auto}, **{"evil.py": evil, "tokenizer_config.json": words})
    if kind == "nobody":
        with pytest.raises(BadSeed, match="never run"):
            load_model(seed, store, device="cpu")
        with pytest.raises(BadSeed, match="never run"):
            load_config(seed, store)
    else:
        tokens_BT = some_tokens(1, 8)
        assert torch.equal(
            load_model(seed, store, device="cpu")(tokens_BT).logits, load_model(plain, store, device="cpu")(tokens_BT).logits
        )
    assert not (tmp_path / "ran").exists()


def test_kernels_that_a_config_names_are_passed_over(store):
    assert hub_kernels._kernels_enabled is False
    plain, tokens_BT = tiny_seed(store), some_tokens(1, 8)
    names = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
    settings = dict.fromkeys(names, "org/kernel") | {
        "use_kernels": True,
        "kernel_config": {"a": "org/kernel"},
        "transformers_weights": "a.bin",
    }
    model = load_model(changed(plain, store, config=settings), store, device="cpu")
    assert torch.equal(model(tokens_BT).logits, load_model(plain, store, device="cpu")(tokens_BT).logits)
    assert model.config._attn_implementation == "sdpa"


def test_quantised_weights_are_refused_with_the_reason(store, tmp_path):
    four = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    seed = changed(tiny_seed(store), store, config=four)
    for use in (lambda: load_model(seed, store), lambda: import_seed(str(seed_folder(seed, store)), Store(tmp_path / "other"))):
        with pytest.raises(BadSeed, match=r"quantised \(bitsandbytes\).*original checkpoint"):
            use()


def test_settings_of_generation_that_are_not_applied_are_known(store):
    plain = tiny_seed(store)
    settings = {"eos_token_id": 0, "temperature": 0.6, "top_k": 20, "num_beams": 1, "repetition_penalty": 1.1, "suppress_tokens": None,
                "no_repeat_ngram_size": 0, "bad_words_ids": [[5]]}  # fmt: skip
    seed = changed(plain, store, **{"generation_config.json": json.dumps(settings)})
    assert own_generation(seed, store) == {"repetition_penalty": 1.1, "bad_words_ids": [[5]]}
    assert own_generation(plain, store) == {}


def test_an_adapter_left_beside_the_weights_is_not_read(store):
    plain, tokens_BT = tiny_seed(store), some_tokens(1, 8)
    adapter = lora_expert(plain, store, 1)
    seed = plain.model_copy(update={"files": adapter.files | plain.files})
    assert torch.equal(load_model(seed, store)(tokens_BT).logits, load_model(plain, store)(tokens_BT).logits)


# ---- tensors -----------------------------------------------------------------------------------------------------


def weights(seed: Seed, store: Store, folder: Path, change) -> Path:
    tensors = load_file(store.get(seed.files["model.safetensors"]))
    change(tensors)
    save_file(tensors, folder / "changed.safetensors", {"format": "pt"})
    return folder / "changed.safetensors"


NORM = "model.layers.0.input_layernorm.weight"
TENSORS = {
    "one is missing": (lambda held: held.pop(NORM), rf"1 tensors are missing.*{NORM}"),
    "one has another shape": (lambda held: held.update({NORM: torch.ones(3)}), "missing or of a wrong shape|cannot be loaded"),
    "a bias of another config": (
        lambda held: held.update({NORM.replace("weight", "bias"): torch.ones(3)}),
        "no place in a LlamaForCausalLM",
    ),
    "a layer that the config leaves out": (lambda held: held.update({NORM.replace(".0.", ".9."): torch.ones(3)}), "no place"),
    "a name for the terminal": (lambda held: held.update({"a\x1b[2Jb‮": torch.ones(3)}), "first a�\\[2Jb�:"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_are_all_from_the_file_and_all_of_the_file(kind, store, tmp_path, capfd):
    change, complaint = TENSORS[kind]
    plain = tiny_seed(store)
    seed = changed(plain, store, weights=weights(plain, store, tmp_path, change))
    with pytest.raises(BadSeed, match=complaint):
        load_model(seed, store)
    assert "\x1b" not in capfd.readouterr().err


def test_constants_that_earlier_versions_stored_are_passed_over(store, tmp_path):
    plain, tokens_BT = tiny_seed(store), some_tokens(1, 8)
    old = weights(plain, store, tmp_path, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    model = load_model(changed(plain, store, weights=old), store)
    assert torch.equal(model(tokens_BT).logits, load_model(plain, store)(tokens_BT).logits)


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "/etc/passwd", 7])
def test_an_index_names_files_of_its_folder_only(name, store):
    plain = tiny_seed(store)
    files = {key: blob for key, blob in plain.files.items() if key != "model.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": {NORM: name}}).encode()
    seed = plain.model_copy(update={"files": files | {"model.safetensors.index.json": store.put(index)}})
    with pytest.raises(BadSeed, match="names no files of the folder"):
        load_model(seed, store)


def test_an_adapter_without_a_tensor_or_of_another_rank_is_refused(store, tmp_path):
    seed = tiny_seed(store)
    expert = lora_expert(seed, store, 1)
    tensors = load_file(store.get(expert.files["adapter_model.safetensors"]))
    del tensors[min(tensors)]
    save_file(tensors, tmp_path / "fewer.safetensors")
    fewer = expert.model_copy(update={"files": expert.files | {"adapter_model.safetensors": store.put(tmp_path / "fewer.safetensors")}})
    with pytest.raises(BadInput, match="1 tensors do not fit"):
        load_model(seed, store, fewer)
    settings = json.loads(store.get(expert.files["adapter_config.json"]).read_text()) | {"r": 60000}
    wide = expert.model_copy(update={"files": expert.files | {"adapter_config.json": store.put(json.dumps(settings).encode())}})
    with pytest.raises(BadInput, match="the rank 60000"):
        load_model(seed, store, wide)


# ---- the network -------------------------------------------------------------------------------------------------


@pytest.fixture
def visits(monkeypatch, tmp_path):
    """Paths that a model hub on this machine was asked for."""
    seen: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield seen
        server.shutdown()


def test_a_record_never_goes_online(visits, store, monkeypatch):
    plain = tiny_seed(store)
    uses = (seed_folder, load_model, tokenizer, end_tokens, load_config, lambda seed, store: Experts(seed, [], store).score(0, [[0, 1, 2]]))
    for files in (plain.files, {}):
        seed = plain.model_copy(update={"files": files, "hub": "org/x@main"})
        for use in uses:
            with pytest.raises(Damaged, match="elmwood seed import org/x@main"):
                use(seed, store)
    assert not visits
    with pytest.raises(BadSeed, match="does not have it"):
        download("org/x", "main")  # as for an id that the user types
    assert visits


def test_a_name_that_is_not_in_the_store_is_no_hub_id_to_fit(visits, store):
    for name in ("no-such-seed", "gpt2", "abcd1234"):
        with pytest.raises(UnknownName, match=f"nothing here is called '{name}'"):
            fitting.fit(name, store=store)
    assert not visits
    with pytest.raises(BadSeed, match="does not have it"):
        fitting.fit("org/x", store=store)
    assert visits


def test_files_that_the_record_of_a_hub_seed_does_not_list_are_not_read(tmp_path, store, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plain, commit = tiny_seed(store), 40 * "a"
    folder = tmp_path / "models--org--x" / "snapshots" / commit
    folder.parent.mkdir(parents=True)
    folder.symlink_to(seed_folder(plain, store))
    seed = plain.model_copy(update={"hub": f"org/x@{commit}"})
    assert seed_folder(seed, store) == folder
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        fewer = {key: blob for key, blob in plain.files.items() if key != name}
        with pytest.raises(Damaged, match=f"no digest of '{name}'"):
            seed_folder(seed.model_copy(update={"files": fewer}), store)
    with pytest.raises(Damaged, match="no digest"):
        seed_folder(seed.model_copy(update={"files": {}}), store)
    with pytest.raises(Damaged, match="stay inside"):
        seed_folder(seed.model_copy(update={"files": plain.files | {"../../../a": plain.files["config.json"]}}), store)


def test_what_is_said_fits_a_terminal():
    assert said("a\x1b]0;x\x07‮b\nsecond") == "a�]0;x��b"
    assert said(ValueError()) == "ValueError"
