"""Standard benchmarks: what EleutherAI's harness reports of a model is what the model says, asked once."""

import json
import math
import warnings

import numpy as np
import pytest
from tiny_models import SHAPE, lora_expert, tiny_seed

from elmwood.corpus.build import build
from elmwood.domains.partition import partition
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput
from elmwood.evaluate import harness
from elmwood.lm.files import tokenizer
from elmwood.lm.load import open_tokenizer
from elmwood.records import Ensemble, Forest
from elmwood.store import Store
from elmwood.study.quality.evaluation import benchmark, evaluate

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # what the harness opens it leaves to be collected
WORDS = ["cat", "mat", "sea", "café", "naïve", "sat on", "sailed over", "déjà vu"]
CHOICE = [{"question": f"the {a} and the {b}", "choices": [a, b, f"the {b}"], "answer": n % 3} for n, (a, b) in enumerate(
    (a, b) for a in WORDS for b in WORDS if a != b
)]  # fmt: skip
GIVEN = [{"question": f"the {word} sat on", "answer": "the"} for word in WORDS]
LONG = [{"text": f"the {word} sat on the mat and sailed over the sea — " * times} for times, word in ((1, "cat"), (5, "mat"), (20, "猫"))]
TASKS = {
    "choice": (CHOICE, "multiple_choice", {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"}, "acc"),
    "given": (GIVEN, "generate_until", {
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["t"], "max_gen_toks": 8},
    }, "exact_match"),
    "next": (GIVEN, "loglikelihood", {"doc_to_text": "{{question}}", "doc_to_target": "{{' ' + answer}}"}, "perplexity"),
    "rolling": (LONG, "loglikelihood_rolling", {"doc_to_text": "", "doc_to_target": "{{text}}"}, "bits_per_byte"),
}  # fmt: skip


class Counted:
    """An LM that counts what it is asked."""

    def __init__(self, lm):
        self.lm, self.calls = lm, 0
        self.context, self.vocabulary, self.separator, self.stops = lm.context, lm.vocabulary, lm.separator, lm.stops

    def score(self, tokens_BT):
        self.calls += 1
        return self.lm.score(tokens_BT)

    def start(self):
        return self.lm.start()

    def extend(self, tokens_T, cache):
        self.calls += 1
        return self.lm.extend(tokens_T, cache)


class Bench:
    """Local tasks, and two models."""

    def __init__(self, folder):
        self.folder, text = folder / "tasks", folder / "text"
        self.folder.mkdir()
        text.mkdir()
        for name, (items, kind, fields, metric) in TASKS.items():
            data = folder / f"{name}.jsonl"
            data.write_text("".join(json.dumps(item) + "\n" for item in items))
            task = {
                "task": name, "dataset_path": "json", "test_split": "test", "output_type": kind, "metric_list": [{"metric": metric}],
                "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}, "metadata": {"version": 3},
                **fields,
            }  # fmt: skip
            (self.folder / f"{name}.yaml").write_text(json.dumps(task))
        (self.folder / "away.yaml").write_text(
            json.dumps({"task": "away", "dataset_path": "nobody/nothing-here", "test_split": "test", "output_type": "multiple_choice",
                        "doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "a", "metric_list": [{"metric": "acc"}]})
        )  # fmt: skip
        rng = np.random.default_rng(0)
        for n in range(80):
            some = ["".join(rng.choice(list(("abcdefg", "stuvwxy")[n % 2]), 4)) for _ in range(20)]
            (text / f"{n}.txt").write_text(" ".join(some))
        self.store = Store(folder / "store")
        division = partition(build([str(text)], self.store), self.store, domains=2)
        self.seed = tiny_seed(self.store)
        experts = [lora_expert(self.seed, self.store, n, domain=n, partition=division.digest) for n in range(2)]
        forest = Forest(seed=self.seed.digest, partition=division.digest, experts=[expert.digest for expert in experts])
        self.ensemble = Ensemble(forest=forest.digest, top_k=2)
        self.live = Ensemble(forest=forest.digest, router="live", top_k=1, temperature=0.5, seed_distance=1.0, memory=0.5)
        for record in (forest, self.ensemble, self.live):
            self.store.add(record)
        self.tokenizer = tokenizer(self.seed, self.store)
        self.words = harness.Words(
            open_tokenizer(self.seed, self.store, True), 0, frozenset([0]), True, {"repetition_penalty": 1.1}
        )  # texts begin with 0

    def reader(self, record):
        return harness.Reader(
            Counted(open_model(record, self.store)), self.words, harness.Answers(self.store, record.digest), generate
        )  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # while the harness and its libraries are imported
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "DISABLE_MULTIPROC"):
            patch.setenv(name, "1")
        import datasets
        import huggingface_hub.constants
        import lm_eval.evaluator  # noqa: F401

        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # other tests may have imported it before
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield Bench(tmp_path_factory.mktemp("bench"))


def direct(lm, before, after):
    """Log-likelihood of tokens after tokens, and whether they are the likeliest each time; by `extend` alone."""
    total, greedy = 0.0, True
    logp_V, cache = lm.extend(before, lm.start())
    for place, token in enumerate(after):
        total, greedy = total + float(logp_V[token]), greedy and int(logp_V.argmax()) == token
        if place + 1 < len(after):
            logp_V, cache = lm.extend([token], cache)
    return total, greedy


@pytest.mark.parametrize("which", ["seed", "ensemble", "live"])
def test_what_the_harness_reports_is_what_the_model_says(which, bench):
    record = getattr(bench, which)
    tasks, reader, lm = harness.open_tasks(list(TASKS), bench.folder), bench.reader(record), open_model(record, bench.store)
    found = harness.benchmark(tasks, reader)
    metrics = {name: value["metrics"] for name, value in found["tasks"].items()}

    def after(context, continuation):
        before, whole = ([0, *bench.words.encode_plain(text)] for text in (context, f"{context} {continuation}"))
        return direct(lm, before, whole[len(before) :])

    right = [np.argmax([after(item["question"], choice)[0] for choice in item["choices"]]) == item["answer"] for item in CHOICE]
    assert metrics["choice"]["acc"]["value"] == pytest.approx(np.mean(right))
    assert metrics["choice"]["acc"]["standard_error"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    logliks = [after(item["question"], item["answer"])[0] for item in GIVEN]
    assert metrics["next"]["perplexity"]["value"] == pytest.approx(math.exp(-np.mean(logliks)), rel=1e-4)
    made = ["".join(step.text for step in generate(lm, bench.tokenizer, item["question"], max_tokens=8, temperature=0)) for item in GIVEN]
    assert reader.generate_until([(item["question"], TASKS["given"][2]["generation_kwargs"]) for item in GIVEN]) == [
        text.split("t")[0] for text in made
    ]
    nats = 0.0
    for item in LONG:
        ids = bench.words.encode(item["text"])  # with the separator, which is scored after itself, as in the harness
        first = direct(lm, [0], ids[: SHAPE.context])[0]
        for start in range(SHAPE.context, len(ids), SHAPE.context):
            end = min(start + SHAPE.context, len(ids))
            first += direct(lm, ids[end - SHAPE.context - 1 : start], ids[start:end])[0]
        nats -= first
    size = sum(len(item["text"].encode()) for item in LONG)
    assert max(len(bench.words.encode_plain(item["text"])) for item in LONG) > 2 * SHAPE.context
    assert metrics["rolling"]["bits_per_byte"]["value"] == pytest.approx(nats / size / math.log(2), rel=1e-4)
    assert {value["version"] for value in found["tasks"].values()} == {"3"}
    assert found["lm_eval"]
    assert found["not_applied"] == {"repetition_penalty": 1.1}
    assert harness.benchmark(harness.open_tasks(["choice"], bench.folder), reader)["not_applied"] == {}  # nothing is generated

    assert reader.lm.calls > 0
    assert found["asked"] > len(CHOICE)
    again = bench.reader(record)
    assert harness.benchmark(tasks, again)["tasks"] == found["tasks"]
    assert (again.lm.calls, again.answers.asked) == (0, 0)


def test_models_do_not_answer_for_one_another_and_a_cut_line_is_asked_again(bench):
    request = [("the cat", " sat"), ("the cat", " sat"), ("", "the")]
    readers = [bench.reader(record) for record in (bench.seed, bench.ensemble)]
    one, other = (reader.loglikelihood(request) for reader in readers)
    assert one[0] == one[1]
    assert one[0] != other[0]
    path = readers[0].answers.path
    path.write_text(path.read_text()[:-4])
    again = bench.reader(bench.seed)
    assert again.loglikelihood(request) == one
    assert again.answers.asked == 1
    assert bench.reader(bench.seed).answers.known == readers[0].answers.known


def test_a_broken_cache_of_answers_is_computed_again(bench):
    request = [("the cat", " sat"), ("", "the")]
    reader = bench.reader(bench.seed)
    right = reader.loglikelihood(request)
    path, (key, *_) = reader.answers.path, reader.answers.known
    lines = path.read_text().splitlines()
    for broken in (
        b"\xff\xfe\x00",
        b"{}",
        b'{"key": 3}',
        b"[1, 2]",
        b'"}"',
        b"[" * 100_000,
        json.dumps({"key": key, "answer": "x"}).encode(),
    ):
        path.write_bytes(b"\n".join([*(line.encode() for line in lines), broken]) + b"\n")
        assert bench.reader(bench.seed).loglikelihood(request) == right
    path.write_bytes(b"\x00" * 1000)
    again = bench.reader(bench.seed)
    assert again.loglikelihood(request) == right
    assert again.answers.asked == 2


def test_the_likeliest_continuation_is_greedy_and_another_is_not(bench):
    reader = bench.reader(bench.ensemble)
    text = reader.generate_until([("the cat sat", {"until": [], "max_gen_toks": 3})])[0]
    before = [0, *bench.words.encode_plain("the cat sat")]
    walk = harness.GreedyText(reader.lm, before)
    logp_V, cache = reader.lm.extend(before, reader.lm.start())
    likeliest = []
    for _ in range(3):
        likeliest.append(int(logp_V.argmax()))
        logp_V, cache = reader.lm.extend(likeliest[-1:], cache)
    assert text == bench.tokenizer.decode(likeliest)
    assert walk.begins_with(likeliest)
    assert walk.begins_with(likeliest[:2])
    assert not walk.begins_with([*likeliest[:2], (likeliest[2] + 1) % SHAPE.vocabulary])


def test_draws_differ_and_come_again(bench):
    request = ("the cat", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    reader = bench.reader(bench.seed)
    drawn = reader.generate_until([request] * 4)
    assert len(set(drawn)) > 1
    assert bench.reader(bench.seed).generate_until([request] * 4) == drawn
    with pytest.raises(BadInput, match="top_k"):
        reader.generate_until([("the", request[1] | {"top_k": 3})])


def test_texts_longer_than_the_model_reads(bench):
    reader = bench.reader(bench.seed)
    long = "the cat sat on the mat " * 30
    (loglik, _), (tail, _) = reader.loglikelihood([("the", " " + long), (long, "and")])
    assert loglik < tail < 0
    assert reader.generate_until([(long, {"until": [], "max_gen_toks": 4})])[0]


def test_a_limit_takes_the_same_items_in_any_order_and_not_the_first(bench):
    tasks = harness.open_tasks(["choice"], bench.folder, limit=7)
    assert len(tasks.items["choice"]) == 7
    assert tasks.items["choice"] != list(range(7))
    data = bench.folder.parent / "choice.jsonl"
    lines, asked = data.read_text().splitlines(), set()
    data.write_text("\n".join(lines[::-1]) + "\n")
    try:
        turned = harness.open_tasks(["choice"], bench.folder, limit=7)
    finally:
        data.write_text("\n".join(lines) + "\n")
    assert turned.digests == tasks.digests
    assert turned.items["choice"] == sorted(len(lines) - 1 - place for place in tasks.items["choice"])
    for record in (bench.seed, bench.ensemble):
        found = harness.benchmark(tasks, bench.reader(record))["tasks"]["choice"]
        asked.add((found["items"], found["of"], found["items_digest"]))
    assert asked == {(7, len(CHOICE), tasks.digests["choice"])}


def test_what_cannot_be_opened_says_so(bench):
    with pytest.raises(BadInput, match="--download"):
        harness.open_tasks(["away"], bench.folder)
    with pytest.raises(BadInput, match="one item"):
        harness.open_tasks(["choice"], bench.folder, limit=0)


def test_models_in_turn(bench):
    models = [bench.seed, bench.ensemble]
    first, second = benchmark(models, "choice, next", bench.store, limit=3, folder=bench.folder)
    assert [first.record, second.record] == models
    assert first.results["tasks"]["choice"]["items"] == 3
    again = benchmark(models, ["choice", "next"], bench.store, limit=3, folder=bench.folder)
    assert [one.results["asked"] for one in again] == [0, 0]
    assert again[1].results["tasks"] == second.results["tasks"]
    with pytest.raises(BadInput, match="no task is named"):
        benchmark(models, " , ", bench.store)
    with pytest.raises(BadInput, match="choose tokenizer, always, never"):
        benchmark(models, "choice", bench.store, bos="perhaps")
    begun = [benchmark(bench.seed, "next", bench.store, folder=bench.folder, bos=bos)[0].results for bos in ("tokenizer", "always")]
    assert [one["bos"]["begins_with"] for one in begun] == ["", "<|endoftext|>"]
    assert begun[0]["tasks"] != begun[1]["tasks"]


def test_models_side_by_side_in_each_domain(bench):
    found = evaluate([bench.ensemble, bench.seed], bench.store, length=64, workers=1)
    assert len(found.domains) == len(found.record.rows[0].domains) == 2
    for row in found.record.rows:
        assert row.macro == pytest.approx(np.mean([value for value in row.domains if value is not None]))
