"""Standard benchmarks: any LM in EleutherAI's lm-evaluation-harness, through its public model interface.

Whatever a model answers is kept by the digest of the model and the request, so no model is asked twice. A text begins with the separator,
as everywhere here; a context that is too long loses its beginning. T tokens, B rows
"""

import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged, UnknownName
from elmwood.records import Digest, fingerprint
from elmwood.registry import require
from elmwood.store import Store

if TYPE_CHECKING:
    from elmwood.lm.interface import LM

PROTOCOL = "harness-v1"  # how a request is cut into tokens: another name for every change of an answer
TOKENS = 8192  # in one batch, padding included
ANSWER = 256  # tokens at most, where a task does not say
SAMPLING = {"do_sample", "until", "max_gen_toks", "temperature", "top_p"}

Span = tuple[list[int], list[int]]  # tokens that are given, tokens that are scored


class Answers:
    """What one model has answered: answers/<digest>.jsonl in the store, a line for each request, in the order they were asked."""

    def __init__(self, store: Store, model: Digest):
        self.path = store.root / "answers" / f"{model}.jsonl"
        text = self.path.read_text() if self.path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # a crash may cut the last one short
        self.known = {line["key"]: line["answer"] for line in lines}
        self.lead = "" if text.endswith("\n") or not text else "\n"
        self.asked = 0  # of the model, since this was opened

    def of(self, kind: str, requests: Sequence[tuple], answer: Callable[[dict[str, tuple]], Iterator[tuple[str, Any]]]) -> list:
        """The answer to each request; `answer` yields (key, answer) for those, by key, that nobody has asked yet."""
        keys = [fingerprint(PROTOCOL, kind, *request) for request in requests]
        for key, value in answer({key: request for key, request in zip(keys, requests, strict=True) if key not in self.known}):
            self.known[key] = value
            self.asked += 1
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(self.lead + json.dumps({"key": key, "answer": value}) + "\n")
            self.lead = ""
        return [self.known[key] for key in keys]


class Reader:
    """Requests -> answers of one model. `generate` is elmwood.ensemble.generate.generate."""

    def __init__(self, lm: "LM", tokenizer: Tokenizer, answers: Answers, generate: Callable[..., Iterator], progress: Progress = silent):
        self.lm, self.tokenizer, self.answers, self.generate, self.progress = lm, tokenizer, answers, generate, progress

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each continuation after its context, nats, and whether it is what the likeliest token each time would give."""
        return [(loglik, greedy) for loglik, greedy in self.answers.of("loglikelihood", requests, self._loglikelihood)]

    def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
        """Of whole texts, nats: windows as long as the model reads, every token scored once."""
        return self.answers.of("loglikelihood_rolling", requests, self._rolling)

    def generate_until(self, requests: Sequence[tuple[str, dict]]) -> list[str]:
        """What follows each context until a stop; a request that draws and comes again is another draw."""
        met: Counter[str] = Counter()
        drawn = []
        for context, settings in requests:
            name = fingerprint(context, settings)
            drawn.append((context, settings, met[name] if settings.get("do_sample") else 0))
            met[name] += 1
        return self.answers.of("generate_until", drawn, self._generate)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    # ---- log-likelihood

    def _loglikelihood(self, asked: Mapping[str, tuple]) -> Iterator[tuple[str, list]]:
        walks: dict[tuple[int, ...], Walk] = {}
        for key, spans, loglik in self._score({key: self._spans(*request) for key, request in asked.items()}):
            follows = [walks.setdefault(tuple(before), Walk(self.lm, before)).gives(after) for before, after in spans]
            yield key, [loglik, all(follows)]

    def _rolling(self, asked: Mapping[str, tuple]) -> Iterator[tuple[str, float]]:
        for key, _, loglik in self._score({key: self._windows(self.lm.separator, self.encode(text)) for key, (text,) in asked.items()}):
            yield key, loglik

    def _spans(self, context: str, continuation: str) -> list[Span]:
        """Both are encoded as one text; space between them belongs to the continuation, as the harness has it."""
        head = context.rstrip()
        before, whole = [self.lm.separator, *self.encode(head)], [self.lm.separator, *self.encode(context + continuation)]
        after = whole[len(before) :] or self.encode(continuation)  # where the border is inside of a token
        if len(after) >= self.lm.context:
            return self._windows(before[-1], after)
        return [(before[-(self.lm.context - len(after)) :], after)]

    def _windows(self, given: int, tokens_T: list[int]) -> list[Span]:
        utils = require("lm_eval.utils", "benchmarks")
        return [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(tokens_T, given, self.lm.context - 1, 1)]

    def _score(self, spans: Mapping[str, list[Span]]) -> Iterator[tuple[str, list[Span], float]]:
        """Key, spans and log-likelihood of each request, the longest first: rows of like length share a batch."""
        longest = {key: max((len(before) + len(after) for before, after in mine), default=1) for key, mine in spans.items()}
        order = sorted(spans, key=longest.__getitem__, reverse=True)
        place = 0
        while place < len(order):
            batch = order[place : place + max(1, TOKENS // longest[order[place]])]
            found = iter(self._rows([span for key in batch for span in spans[key]]))
            for key in batch:
                loglik = sum(next(found) for _ in spans[key])
                if not np.isfinite(loglik):
                    raise Damaged("the model gives log-likelihoods that are not finite: its weights are broken; train or download it again")
                yield key, spans[key], float(loglik)
            place += len(batch)
            self.progress("loglikelihood", place, len(order), "requests")

    def _rows(self, spans: Sequence[Span]) -> Iterator[float]:
        """Of what is scored in each span, nats."""
        longest = max((len(before) + len(after) for before, after in spans), default=1)
        size = max(1, TOKENS // longest)
        for start in range(0, len(spans), size):
            some = spans[start : start + size]
            tokens_BT = np.full((len(some), longest), self.lm.separator)
            for row_T, (before, after) in zip(tokens_BT, some, strict=True):
                row_T[: len(before) + len(after)] = before + after
            loglik_BT = np.asarray(self.lm.score(tokens_BT), np.float64)
            for row_T, (before, after) in zip(loglik_BT, some, strict=True):
                yield row_T[len(before) : len(before) + len(after)].sum()

    # ---- generation

    def _generate(self, asked: Mapping[str, tuple]) -> Iterator[tuple[str, str]]:
        for done, (key, request) in enumerate(asked.items()):
            yield key, self._continue(*request)
            self.progress("generate", done + 1, len(asked), "requests")

    def _continue(self, context: str, settings: dict, nth: int) -> str:
        wanted = require("lm_eval.models.utils", "benchmarks").normalize_gen_kwargs(settings, default_max_gen_toks=ANSWER)
        draws = bool(settings.get("do_sample"))
        foreign = [name for name in wanted if name not in SAMPLING and (draws or (name == "num_beams" and wanted[name] != 1))]
        if foreign:
            raise BadInput(f"a task asks for {', '.join(foreign)}, and text is drawn here by temperature and top_p: leave the task out")
        kept = self.lm.context - min(wanted["max_gen_toks"], self.lm.context // 2)
        text, stops = "", [stop for stop in wanted["until"] if stop]
        for step in self.generate(
            self.lm, self.tokenizer, [self.lm.separator, *self.encode(context)][-kept:], max_tokens=wanted["max_gen_toks"],
            temperature=wanted.get("temperature", 1.0) if draws else 0.0, top_p=wanted.get("top_p", 1.0), rng_seed=nth,
        ):  # fmt: skip
            text += step.text
            if any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Walk:
    """The likeliest token each time after a context; read only as far as somebody asks."""

    def __init__(self, lm: "LM", before: list[int]):
        self.lm, self.unread, self.cache, self.tokens = lm, before, lm.start(), list[int]()

    def gives(self, after: Sequence[int]) -> bool:
        for t, token in enumerate(after):
            if t == len(self.tokens):
                logp_V, self.cache = self.lm.extend(self.unread, self.cache)
                self.unread = [int(logp_V.argmax())]
                self.tokens += self.unread
            if token != self.tokens[t]:
                return False
        return True


def adapter(reader: Reader) -> Any:
    """The harness's own kind of model (lm_eval.api.model.LM). Raises MissingExtra."""
    base: Any = require("lm_eval.api.model", "benchmarks").LM

    class Adapter(base):
        def loglikelihood(self, requests):
            return reader.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return reader.loglikelihood_rolling([request.args for request in requests])

        def generate_until(self, requests):
            return reader.generate_until([request.args for request in requests])

    return Adapter()


# ---- tasks ------------------------------------------------------------------------------------------------------


class Tasks(NamedTuple):
    """Tasks as the harness loads them, and which of their items are asked."""

    loaded: dict[str, Any]
    items: dict[str, list[int]]  # by task, ascending
    total: dict[str, int]
    digests: dict[str, str]  # of the items' content: equal where the same was asked


def offline() -> None:
    """No task fetches anything. To be called before the libraries that read it are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")


def open_tasks(names: Sequence[str], folder: Path | None = None, limit: int | None = None) -> Tasks:
    """Load tasks and groups by name, from a folder of the harness's YAML files or from those it brings.

    Items are those whose content has the least hash: the same for every model, and for every order they come in. Tasks of a folder may
    bring code of their own: only for folders of the user of this machine. Raises MissingExtra, UnknownName, BadInput.
    """
    manager_of = require("lm_eval.tasks", "benchmarks").TaskManager
    if limit is not None and limit < 1:
        raise BadInput(f"a task needs one item at least, and {limit} were asked for: leave the limit out for all")
    manager = manager_of(include_path=folder and str(folder), include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = manager_of(include_path=folder and str(folder))  # thousands of files
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UnknownName(f"no task {', '.join(unknown)} in the harness{f' or {folder}' if folder else ''}: check the spelling")
    random.seed(0)  # some tasks shuffle their choices while they load
    np.random.seed(1234)  # noqa: NPY002
    try:
        loaded = manager.load(list(names))
    except (OSError, ValueError, ImportError) as error:  # whatever the datasets library makes of a missing network
        raise BadInput(
            f"a task of {', '.join(names)} cannot be opened ({type(error).__name__}: {str(error).strip().splitlines()[0]}): nothing is "
            "fetched unless asked; allow it with --download, or use a folder of tasks whose data is here"
        ) from error
    items, total, digests = {}, {}, {}
    for name, task in loaded["tasks"].items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
        hashes = [_hash(item) for item in task.eval_docs]
        items[name] = sorted(sorted(range(len(hashes)), key=lambda place: (hashes[place], place))[:limit])
        total[name], digests[name] = len(hashes), fingerprint(sorted(hashes[place] for place in items[name]))
    return Tasks(loaded, items, total, digests)


def _hash(item: Any) -> str:
    return hashlib.sha256(f"items:{json.dumps(item, sort_keys=True, default=repr)}".encode()).hexdigest()


def benchmark(tasks: Tasks, reader: Reader) -> dict[str, Any]:
    """One model's results: of each task its version, items and metrics with standard errors; of each group its metrics."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # or it forks a process that has threads to draw its bootstrap
    with redirect_stdout(sys.stderr):  # which it talks about
        found = require("lm_eval", "benchmarks").evaluate(
            lm=adapter(reader), task_dict=tasks.loaded, samples=tasks.items, bootstrap_iters=1000, log_samples=False
        )
    return {
        "lm_eval": version("lm_eval"),
        "tasks": {
            name: {
                "version": str(found["versions"].get(name, "")),
                "items": len(tasks.items[name]),
                "of": tasks.total[name],
                "items_digest": tasks.digests[name],
                "metrics": metrics(found["results"][name]),
            }
            for name in tasks.items
        },
        "groups": {name: metrics(values) for name, values in found.get("groups", {}).items()},
        "asked": reader.answers.asked,
    }


def metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness's "acc,none" and "acc_stderr,none" -> acc: value and standard error. A filter other than none stays in the name."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr"):
            error = values.get(f"{name}_stderr,{kind}")
            found[name if kind == "none" else key] = {"value": _finite(value), "standard_error": _finite(error)}
    return found


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) and np.isfinite(value) else None
