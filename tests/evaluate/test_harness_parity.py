"""Numbers equal those of lm-evaluation-harness's own `hf` model on the exported checkpoint, item by item."""

import json

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_models import WORDS, lora_expert, louder
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate import harness
from elmwood.lm.load import end_tokens, import_seed, open_tokenizer
from elmwood.store import Store
from elmwood.study.exporting import export

pytestmark = pytest.mark.filterwarnings("ignore::")  # the harness and what it imports
TEXT = [WORDS, "question: what is the answer? answer: yes or no, maybe. hello world, a dog ran home at noon to eat 12 apples."] * 3
CONTEXT = 64
LONG = "the cat sat on the mat and sailed over the sea; a dog ran home at noon to eat 12 apples "
FEW = ["<unk>", "<s>", "</s>"]


def byte_level(bos: bool) -> tuple[Tokenizer, dict]:
    """As GPT-2's, which begins a text with nothing, or as Llama 3's, which begins it with a token of its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|begin|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if bos:
        made.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    return made, {"eos_token": "<|endoftext|>"} | ({"bos_token": "<|begin|>"} if bos else {})


def byte_fallback() -> tuple[Tokenizer, dict]:
    """As Llama 2's: sentencepiece BPE with byte fallback; a space is put before a text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = FEW + [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    spec = json.loads(made.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(spec))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def unigram() -> tuple[Tokenizer, dict]:
    """As XLNet's or ALBERT's: sentencepiece Unigram; it has a bos, and does not add it."""
    made = Tokenizer(models.Unigram([(token, 0.0) for token in FEW], unk_id=0))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=150, special_tokens=FEW, unk_token="<unk>", show_progress=False))
    return made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


KINDS = {"bytes": lambda: byte_level(False), "bytes with bos": lambda: byte_level(True), "fallback": byte_fallback, "unigram": unigram}


class Both:
    """An expert read by this package, and its exported checkpoint by the harness's own class."""

    def __init__(self, kind, folder, alter=lambda model, tokenizer: None):
        tokenizer, settings = KINDS[kind]()
        self.made = folder / "made"
        bos, eos = (tokenizer.token_to_id(settings.get(name, settings["eos_token"])) for name in ("bos_token", "eos_token"))
        config = LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=CONTEXT, bos_token_id=bos, eos_token_id=eos, pad_token_id=None,
        )  # fmt: skip
        alter(model := louder(LlamaForCausalLM(config)), tokenizer)
        model.save_pretrained(self.made)
        tokenizer.save(str(self.made / "tokenizer.json"))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (self.made / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        self.store = Store(folder / "store")
        self.seed = import_seed(str(self.made), self.store)
        self.expert = lora_expert(self.seed, self.store, 1, settings={"target_modules": ["q_proj"]})
        self.exported = export(self.expert, folder / "exported", format="transformers", store=self.store)
        self.lm = open_model(self.expert, self.store)

    def reader(self, add_bos):
        words = harness.Words(
            open_tokenizer(self.seed, self.store, add_bos), self.seed.separator, frozenset(end_tokens(self.seed, self.store)), add_bos
        )
        return harness.Reader(self.lm, words, harness.Answers(self.store, self.expert.digest), generate)

    def reference(self, add_bos):
        """Without its cache of logits (lm-eval 0.4.13): requests of equal tokens, split at another place, would get one another's."""
        # where a tokenizer has no bos, the harness would add none; here it is the separator
        tokenizer = open_tokenizer(self.seed, self.store, True) if add_bos else None
        return HFLM(
            pretrained=str(self.exported), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=1, add_bos_token=add_bos,
            logits_cache=False,
        )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    return Both(request.param, tmp_path_factory.mktemp("both"))


def pairs_of(reader):
    """Contexts and continuations: around spaces, inside tokens, at and over the context."""
    count = lambda text: len(reader.words.encode(text))  # noqa: E731
    fits = "a"
    while count(fits + " home") < CONTEXT + 1:
        fits += " cat" if count(fits + " cat home") <= CONTEXT + 1 else "s"
    special = reader.words.decode([reader.words.tokenizer.eos_token_id])
    return [
        ("the cat", " sat on the mat"), ("the cat ", "sat on"), ("the cat  ", "sat"), ("the cat\n", "sat on"), ("the cat\n\n", " sat"),
        ("what is", " the answer"), ("a\t", "b"), ("the cat\u00a0", "sat"), ("naïve café", " 海 and 猫"), ("", "the cat sat"),
        ("", " the cat"), ("the", " cat"), (f"the {special} cat", " sat"), (LONG * 6, " and home"), ("the cat", (" " + LONG)[:40]),
        (fits, " home"), (fits + " cat", " home"), (fits + "s", " home"), (special + "the cat", " sat"), ("", special + "the cat"),
    ]  # fmt: skip


def ask(reference, kind, requests):
    return getattr(reference, kind)([Instance(kind, {}, one, n) for n, one in enumerate(requests)], disable_tqdm=True)


STOPS = [
    {"until": ["the", "zz"], "max_gen_toks": 12}, {"max_gen_toks": 8}, {"until": [], "max_gen_toks": 8},
    {"until": "a", "max_gen_toks": 20},
    {"until": ["\n\n", " s", "b c"], "max_gen_toks": 30}, {"until": ["zz"], "max_gen_toks": 40},
    {"until": ["zz"], "max_gen_toks": 9, "max_length": 40},
    {"until": [" and", "d"], "max_gen_toks": 30}, {"until": [""], "max_gen_toks": 8},
    {"until": ["zz"], "temperature": 0.0, "do_sample": False, "max_gen_toks": 8},
]  # fmt: skip
PROMPTS = ["the cat sat", " the cat sat ", "question: what is the answer?\nanswer:", LONG * 6]


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_requests_have_the_answers_of_the_hf_model(both, add_bos):
    reader, reference = both.reader(add_bos), both.reference(add_bos)
    assert (reader.words.prefix, both.lm.context) == (reference.prefix_token_id, reference.max_length)
    requests = [pair for pair in pairs_of(reader) if not pair[0] or reference._encode_pair(*pair)[1]]  # it asserts that there is one
    mine, theirs = reader.loglikelihood(requests), ask(reference, "loglikelihood", requests)
    np.testing.assert_allclose([one for one, _ in mine], [one for one, _ in theirs], atol=1e-4, rtol=0)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    texts = [(LONG * 5,), (LONG,), ("cat",), (" the cat ",)]
    np.testing.assert_allclose(reader.loglikelihood_rolling(texts), ask(reference, "loglikelihood_rolling", texts), atol=1e-4, rtol=0)
    settings = STOPS if add_bos is None else STOPS[:2]
    asked = [(PROMPTS[n % 3], one) for n, one in enumerate(settings)] + [(LONG * 6, one) for one in settings[::4]]
    assert reader.generate_until(asked) == [ask(reference, "generate_until", [(p, dict(s))])[0] for p, s in asked]


QUESTIONS = [
    {"q": f"{'the cat sat. ' * (9 * n % 25)}what is the {word}? ", "choices": ["yes", "no, maybe", f"a {word}"], "gold": n % 3,
     "text": LONG * n}
    for n, word in enumerate(("cat", "mat", "naïve café", "猫", "answer"))
]  # fmt: skip
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "gold",
               "num_fewshot": 1, "fewshot_split": "test", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "given": {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{choices[0]}}", "metric_list": [
        {"metric": "exact_match"}], "generation_kwargs": {"until": ["\n\n", "the"], "max_gen_toks": 12}},
    "next": {"output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": "{{choices[1]}}",
             "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in QUESTIONS), encoding="utf-8")
    for name, fields in TASKS.items():
        files = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
        task = {"task": name, "dataset_path": "json", "test_split": "test", "dataset_kwargs": files, **fields}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setenv("DISABLE_MULTIPROC", "1")
        yield folder


def test_tasks_have_the_items_and_metrics_of_the_hf_model(both, tasks):
    reader, reference, found = both.reader(None), both.reference(None), {}
    loaded = harness.open_tasks(list(TASKS), tasks)
    reported = [harness.benchmark(loaded, reader)]
    reported += [harness.benchmark(loaded, both.reader(None))]
    assert reported[0]["tasks"] == reported[1]["tasks"]  # few-shot examples too are the same for every model
    assert (reported[1]["asked"], reported[0]["bos"]["add_bos_token"]) == (0, None)
    theirs = lm_eval.simple_evaluate(
        model=reference, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0
    )
    for name in TASKS:
        asked = [request for item in theirs["samples"][name] for request in item["arguments"]]
        kind = TASKS[name]["output_type"].replace("multiple_choice", "loglikelihood")
        here, there = getattr(reader, kind)(asked), [one for item in theirs["samples"][name] for (one,) in item["resps"]]
        found[name] = len(here)
        if kind == "generate_until":
            assert here == there
        else:
            np.testing.assert_allclose(np.array(here, float), np.array(there, float), atol=1e-4, rtol=0)
        for metric, value in reported[0]["tasks"][name]["metrics"].items():
            assert value["value"] == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-5)
    assert found == {"choice": 15, "given": 5, "next": 5, "rolling": 5}
    assert reader.answers.asked == reported[0]["asked"]  # the requests were the same, with the same examples


def says_a_word_and_ends(model, word, eos):
    """Every text goes on with this token, and then with the end."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.mul_(0.01)[:, 0] = 3.0
        embedding[word, 0] = -3.0
        head.zero_()
        head[word, 0], head[eos, 0] = 5.0, -5.0


def test_a_first_word_has_no_space_and_the_end_ends(tmp_path):
    def alter(model, tokenizer):
        says_a_word_and_ends(model, tokenizer.encode("home", add_special_tokens=False).ids[0], tokenizer.token_to_id("</s>"))

    both = Both("fallback", tmp_path, alter)
    reader, reference = both.reader(None), both.reference(None)
    asked = [("the cat", {"until": ["</s>"], "max_gen_toks": 9}), ("the cat", {"until": ["<s>", "zz"], "max_gen_toks": 5})]
    mine = reader.generate_until(asked)
    assert mine == [ask(reference, "generate_until", [(p, dict(s))])[0] for p, s in asked]
    assert mine[0] == both.reader(None).words.decode(reader.words.encode_plain("home")[:1])
    assert mine[0][0] != " "
