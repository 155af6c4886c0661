"""Adapters trained elsewhere become experts, or are refused with the reason."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, full_expert, save_adapter
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from elmwood.errors import BadInput, BadSeed, Damaged, ForeignExpert
from elmwood.lm.experts import Experts
from elmwood.lm.load import load_model
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.export.folder import export
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Expert, Recipe, canonical
from elmwood.study.exporting import export as exported
from elmwood.train.adopt import import_adapter, import_expert


@pytest.fixture(scope="module")
def elsewhere(seed, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    plan = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}}
    save_adapter(load_model(seed, store), str(folder), 5, **plan)
    return folder


@torch.inference_mode()
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_from_elsewhere_becomes_an_expert(dora, seed, store, elsewhere, tmp_path):
    folder = elsewhere
    if dora:
        save_adapter(load_model(seed, store), str(folder := tmp_path), 5, r=3, target_modules=["q_proj", "o_proj"], use_dora=True)
    expert = import_adapter(str(folder), seed, store, domain=2)
    assert (expert.seed, expert.domain, expert.recipe.method) == (seed.digest, 2, "dora" if dora else "lora")
    assert import_adapter(str(folder), seed, store, domain=2) == expert
    tokens_BT = torch.randint(SHAPE.vocabulary, (2, 12), generator=torch.Generator().manual_seed(14))
    logp_BTV = PeftModel.from_pretrained(load_model(seed, store), folder).eval()(tokens_BT).logits[:, :-1].log_softmax(-1)
    wanted_BT = logp_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(Experts(seed, [expert], store).score(0, tokens_BT)[:, 1:], wanted_BT, atol=1e-5, rtol=1e-5)


def test_an_exported_expert_that_comes_back_knows_what_it_said(seed, store, elsewhere, tmp_path):
    expert = import_adapter(str(elsewhere), seed, store)
    known = expert.model_copy(update={"probe": (-1.5, -2.25)})
    folder = exported(store.add(known), tmp_path / "folder", store=store)
    assert import_adapter(str(folder), seed, store) == known
    (folder / "elmwood.json").write_bytes(canonical(known.model_copy(update={"seed": "0" * 64})))
    assert import_adapter(str(folder), seed, store) == expert


ENDLESS = "((((((((((.*)*)*)*)*)*)*)*)*)*)*!"  # matching it takes time that grows exponentially
FOREIGN = {
    "is not a folder": lambda folder, good: shutil.rmtree(folder),
    "no adapter_model.safetensors": lambda folder, good: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    "cannot be read": lambda folder, good: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 90),
    "not in this seed": lambda folder, good: adapter_settings(folder, target_modules=["c_attn"]),
    "12 tensors do not fit": lambda folder, good: adapter_settings(folder, r=5, rank_pattern={}),
    "4 tensors do not fit": lambda folder, good: adapter_settings(folder, rank_pattern={}),
    "another base": lambda folder, good: save_file({f"{name}x": one for name, one in good.items()}, folder / "adapter_model.safetensors"),
    "contains NaN or Inf": lambda folder, good: save_file(
        {name: one / 0 for name, one in good.items()}, folder / "adapter_model.safetensors"
    ),
    "VERA": lambda folder, good: adapter_settings(folder, peft_type="VERA"),
    "modules_to_save": lambda folder, good: adapter_settings(folder, modules_to_save=["lm_head"]),
    "PEFT refuses": lambda folder, good: adapter_settings(folder, layers_to_transform=[0], target_modules="all-linear"),
    "positive": lambda folder, good: adapter_settings(folder, r=-1),
    "rank 1000000000 is no": lambda folder, good: adapter_settings(folder, r=10**9),
    "alpha inf|1e999 is too large": lambda folder, good: (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": 1e999')
    ),
    "rank_pattern has .*list the names": lambda folder, good: adapter_settings(folder, rank_pattern={ENDLESS: 2}),
    "alpha_pattern has .*list the names": lambda folder, good: adapter_settings(folder, alpha_pattern={ENDLESS: 2}),
    "exclude_modules has .*list the names": lambda folder, good: adapter_settings(folder, exclude_modules=ENDLESS),
    "layers_pattern has .*list the names": lambda folder, good: adapter_settings(folder, layers_pattern=[ENDLESS], layers_to_transform=[0]),
    "no table of names": lambda folder, good: adapter_settings(folder, alpha_pattern=["q_proj"]),
    **{
        f"values of {kind}": lambda folder, good, dtype=dtype: save_file(
            {key: value.to(dtype) for key, value in good.items()}, folder / "adapter_model.safetensors"
        )
        for kind, dtype in (("I32", torch.int32), ("C64", torch.complex64), ("F8_E4M3", torch.float8_e4m3fn))
    },
    "no JSON object": lambda folder, good: (folder / "adapter_config.json").write_text("[]"),
    "nested too deeply": lambda folder, good: (folder / "adapter_config.json").write_text("[" * 200_000),
}


def adapter_settings(folder, **changed):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changed))


@pytest.mark.parametrize("complaint", FOREIGN)
def test_an_adapter_that_is_none_of_this_seed_is_refused(complaint, seed, store, elsewhere, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(elsewhere, folder)
    FOREIGN[complaint](folder, load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(BadInput, match=complaint):
        import_adapter(str(folder), seed, store)


def test_target_modules_given_as_a_pattern_are_those_with_tensors(seed, store, elsewhere, tmp_path):
    """Some tools save a pattern; it is never matched, however long that would take."""
    folder = tmp_path / "adapter"
    shutil.copytree(elsewhere, folder)
    plain = import_adapter(str(folder), seed, store)
    for pattern in (ENDLESS, r"model\.layers\.\d+\..*\.(q_proj|v_proj|down_proj)"):
        adapter_settings(folder, target_modules=pattern)
        expert = import_adapter(str(folder), seed, store)
        kept = json.loads(store.get(expert.files["adapter_config.json"]).read_bytes())["target_modules"]
        assert len(kept) == 3 * SHAPE.layers
        assert {name.rpartition(".")[2] for name in kept} == {"q_proj", "v_proj", "down_proj"}
        tokens_BT = torch.randint(SHAPE.vocabulary, (2, 12), generator=torch.Generator().manual_seed(16))
        wanted_BT = Experts(seed, [plain], store).score(0, tokens_BT)
        torch.testing.assert_close(Experts(seed, [expert], store).score(0, tokens_BT), wanted_BT)


def test_the_first_of_several_patterns_applies_as_it_stands_in_the_file(seed, store, elsewhere, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(elsewhere, folder)
    adapter_settings(folder, alpha_pattern={"v_proj": 3, "layers.0.self_attn.v_proj": 5, "^model.layers.0.self_attn.q_proj": 7})
    expert = import_adapter(str(folder), seed, store)
    tokens_BT = torch.randint(SHAPE.vocabulary, (2, 12), generator=torch.Generator().manual_seed(15))
    with torch.inference_mode():
        logp_BTV = PeftModel.from_pretrained(load_model(seed, store), folder).eval()(tokens_BT).logits[:, :-1].log_softmax(-1)
        own_BTV = load_model(seed, store, expert)(tokens_BT).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(own_BTV, logp_BTV)
    wanted_BT = logp_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(Experts(seed, [expert], store).score(0, tokens_BT)[:, 1:], wanted_BT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("files", [{}, {"adapter_model.bin": b"pickle"}, {"adapter_model.safetensors": b"0" * 90}])
def test_an_expert_without_sound_weights_is_refused_before_peft_sees_it(files, seed, store):
    config = json.dumps({"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["q_proj"]}).encode()
    kept = {name: store.put(content) for name, content in ({"adapter_config.json": config} | files).items()}
    expert = Expert(seed=seed.digest, data=(), recipe=Recipe(method="dora", steps=1), files=kept)
    with pytest.raises((BadInput, Damaged), match=r"no adapter_model.safetensors|no safetensors file"):
        load_model(seed, store, expert)


# ---- full fine-tunes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(seed, store, tmp_path_factory):
    """A fine-tune as a trainer leaves it: half precision, in shards, no cache, the tokenizer padding and truncating."""
    folder = tmp_path_factory.mktemp("tuned")
    model, words = load_model(seed, store), Tokenizer.from_file(str(store.folder(seed.files) / "tokenizer.json"))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    model.config.use_cache = False
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    words.enable_truncation(8)
    words.enable_padding()
    words.save(str(folder / "tokenizer.json"))
    return folder


def test_a_fine_tune_from_elsewhere_becomes_a_full_expert(seed, store, tuned, tmp_path):
    expert = import_expert(str(tuned), seed, store, domain=1)
    assert (expert.seed, expert.domain, expert.recipe.method) == (seed.digest, 1, "full")
    assert import_expert(str(tuned), seed, store, domain=1) == expert
    tokens_BT = torch.randint(SHAPE.vocabulary, (2, 12), generator=torch.Generator().manual_seed(14))
    with torch.inference_mode():
        logp_BTV = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)(tokens_BT).logits[:, :-1].log_softmax(-1)
    wanted_BT = logp_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(Experts(seed, [expert], store, "cpu").score(0, tokens_BT)[:, 1:], wanted_BT, atol=1e-5, rtol=1e-5)
    export(expert, store, tmp_path / "out")
    base, mine = load_model(seed, store).state_dict(), AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).state_dict()
    other = full_expert(seed, store, 8)
    (merged,) = merge(seed, {one.digest: everywhere(1.0) for one in (expert, other)}, [Answer("average", {})], store)
    its, found = load_model(seed, store, other).state_dict(), load_model(seed, store, merged).state_dict()
    for name in base:
        torch.testing.assert_close(found[name], (mine[name] + its[name]) / 2, atol=1e-6, rtol=1e-6)


def tune(change):
    """A checkpoint of the seed's with its settings, words or numbers changed."""

    def made(folder, seed, store):
        model = load_model(seed, store)
        model.save_pretrained(folder)
        shutil.copyfile(store.folder(seed.files) / "tokenizer.json", folder / "tokenizer.json")
        change(folder, model)

    return made


def config_of(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changed))


def words_of(folder):
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.add_special_tokens(["<|user|>"])
    words.save(str(folder / "tokenizer.json"))


def longer(folder, model):
    model.resize_token_embeddings(SHAPE.vocabulary + 8, mean_resizing=False)
    model.save_pretrained(folder)


def broken(folder, model):
    model.get_parameter("model.norm.weight").data[3] = torch.nan
    model.save_pretrained(folder)


UNLIKE = {
    "model_type = 'mistral'": lambda folder, model: config_of(folder, model_type="mistral", architectures=["MistralForCausalLM"]),
    "hidden_act = 'relu'": lambda folder, model: config_of(folder, hidden_act="relu"),
    "num_hidden_layers = 1": lambda folder, model: config_of(folder, num_hidden_layers=1),
    "another tokenizer": lambda folder, model: words_of(folder),
    "no tokenizer": lambda folder, model: (folder / "tokenizer.json").unlink(),
    "NaN": broken,
    "an adapter and a whole model": lambda folder, model: (folder / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("complaint", UNLIKE)
def test_a_checkpoint_that_is_no_fine_tune_of_this_seed_is_refused(complaint, seed, store, tmp_path):
    tune(UNLIKE[complaint])(tmp_path, seed, store)
    before = sorted((store.root / "records").iterdir())
    with pytest.raises((BadInput, BadSeed, ForeignExpert), match=complaint):
        import_expert(str(tmp_path), seed, store)
    assert sorted((store.root / "records").iterdir()) == before


def test_a_fine_tune_with_other_rows_is_merged_as_far_as_they_go_together(seed, store, tmp_path):
    tune(longer)(tmp_path, seed, store)
    expert, other = import_expert(str(tmp_path), seed, store), full_expert(seed, store, 8)
    members = {one.digest: everywhere(1.0) for one in (expert, other)}
    (merged,) = merge(seed, members, [Answer("average", {})], store, resize=True)
    assert load_model(seed, store, merged).config.vocab_size == SHAPE.vocabulary
    with pytest.raises(BadInput, match="--resize"):
        merge(seed, members, [Answer("average", {})], store)
    with pytest.raises(BadInput, match=r"328 rows of vocabulary.*320"):
        Experts(seed, [expert], store, "cpu").score(0, torch.zeros(1, 4, dtype=torch.long))


def test_tokenizers_are_compared_by_what_they_say(seed, store):
    """Older files spell a merge as one string: the same tokens, other bytes."""
    expert, other = (full_expert(seed, store, number) for number in (8, 9))
    words = json.loads(store.get(seed.files["tokenizer.json"]).read_bytes())
    older = words | {"model": words["model"] | {"merges": [" ".join(pair) for pair in words["model"]["merges"]]}}
    fewer = words | {"model": words["model"] | {"merges": words["model"]["merges"][:-1]}}

    def average(spelled):
        one = expert.model_copy(update={"files": expert.files | {"tokenizer.json": store.put(json.dumps(spelled).encode())}})
        store.add(one)
        return merge(seed, {e.digest: everywhere(1.0) for e in (one, other)}, [Answer("average", {})], store)

    average(older)
    with pytest.raises(BadInput, match="another tokenizer"):
        average(fewer)
