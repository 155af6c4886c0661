"""Standard benchmarks: any LM in EleutherAI's lm-evaluation-harness, through its public model interface.

Answers are cached by the digest of the model and the request, so no request is computed twice. A request becomes tokens as in the
harness's own `hf` model, so the numbers are those of `lm_eval --model hf` on the exported checkpoint. T tokens, B rows
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
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged, UnknownName
from elmwood.records import Digest, fingerprint
from elmwood.registry import require
from elmwood.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elmwood.lm.interface import LM

PROTOCOL = "harness-v3"  # how a request becomes tokens; a change of any answer needs a new name
TOKENS = 8192  # in one batch, padding included
ANSWER = 256  # most new tokens, where a task sets no limit
BOS = {"tokenizer": None, "always": True, "never": False}  # the harness's add_bos_token
SAMPLING = {"do_sample", "until", "max_gen_toks", "max_length", "temperature", "top_p"}
IDLE = {"top_k", "min_p", "typical_p", "seed"}  # of no effect where the likeliest token is taken

Compute = Callable[[dict[str, tuple]], Iterator[tuple[str, Any]]]
Span = tuple[list[int], list[int]]  # given tokens, scored tokens


class Answers:
    """The answers of one model: answers/<digest>.jsonl in the store, a line per request, in the order of computation."""

    def __init__(self, store: Store, model: Digest):
        self.path = store.root / "answers" / f"{model}.jsonl"
        text = self.path.read_text(errors="replace", encoding="utf-8") if self.path.exists() else ""
        self.known = dict(filter(None, map(_answer, text.splitlines())))
        self.lead = "" if text.endswith("\n") or not text else "\n"
        self.asked = 0  # requests computed by this object

    def look_up(self, kind: tuple, requests: Sequence[tuple], compute: Compute, is_valid: Callable[[Any], bool]) -> list:
        """The answer to each request; `compute` yields (key, answer) for those, by key, that have no valid answer yet."""
        keys = [fingerprint(PROTOCOL, *kind, *request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if not is_valid(self.known.get(key))}
        for key, value in compute(missing):
            self.known[key] = value
            self.asked += 1
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.lead + json.dumps({"key": key, "answer": value}) + "\n")
            self.lead = ""
        return [self.known[key] for key in keys]


def _answer(line: str) -> tuple[str, Any] | None:
    """Key and answer of a line; None where a crash or a disk error left something else."""
    try:
        read = json.loads(line)
        return str(read["key"]), read["answer"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_scored(answer: Any) -> bool:
    return isinstance(answer, list) and len(answer) == 2 and _is_loglik(answer[0]) and isinstance(answer[1], bool)


def _is_loglik(answer: Any) -> bool:
    return isinstance(answer, float) and np.isfinite(answer)


class Words(NamedTuple):
    """How text becomes tokens: the seed's tokenizer as transformers opens it, and what begins a text."""

    tokenizer: "PreTrainedTokenizerBase"
    separator: int
    ends: frozenset[int]  # tokens that end a generated text: the checkpoint's eos
    add_bos: bool | None = None  # None: as the tokenizer does by itself
    unlike: Mapping[str, Any] = MappingProxyType({})  # what `hf` does to generated texts by the seed's generation_config; not done here

    @property
    def prefix(self) -> int:
        """The token before a text that has none before it: bos, else eos."""
        found = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.separator)
        return next(token for token in found if isinstance(token, int))

    def encode(self, text: str) -> list[int]:
        """With special tokens, such as bos, where the tokenizer or `add_bos` adds them and the text has none."""
        if self.add_bos is False or text.startswith(self.decode([self.prefix])):
            return self.encode_plain(text)
        return self.tokenizer.encode(text) if self.add_bos is None else self.tokenizer.encode(text, add_special_tokens=True)

    def encode_plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int], *, special: bool = True) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def facts(self) -> dict[str, Any]:
        """What begins a text, as results say it."""
        return {
            "add_bos_token": self.add_bos, "begins_with": self.decode(self.encode("")), "prefix_token": self.decode([self.prefix]),
            "prefix_token_id": self.prefix,
        }  # fmt: skip


class Reader:
    """Requests -> answers of one model. `generate` is elmwood.ensemble.generate.generate."""

    def __init__(self, lm: "LM", words: Words, answers: Answers, generate: Callable[..., Iterator], progress: Progress = silent):
        self.lm, self.words, self.answers, self.generate, self.progress = lm, words, answers, generate, progress

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each continuation after its context: its log-likelihood, nats, and whether greedy decoding would generate it."""
        found = self._look_up("loglikelihood", requests, self._loglikelihood, _is_scored)
        return [(loglik, greedy) for loglik, greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
        """Log-likelihoods of whole texts, nats: in windows as long as the model's context, every token scored once."""
        return self._look_up("loglikelihood_rolling", requests, self._rolling, _is_loglik)

    def generate_until(self, requests: Sequence[tuple[str, dict]]) -> list[str]:
        """The continuation of each context up to a stop. A request to sample that is repeated gets another sample."""
        seen: Counter[str] = Counter()
        numbered = []
        for context, settings in requests:
            name = fingerprint(context, settings)
            numbered.append((context, settings, seen[name] if settings.get("do_sample") else 0))
            seen[name] += 1
        return self._look_up("generate_until", numbered, self._generate, lambda answer: isinstance(answer, str))

    def _look_up(self, kind: str, requests: Sequence[tuple], compute: Compute, is_valid: Callable[[Any], bool]) -> list:
        return self.answers.look_up((kind, self.words.add_bos), requests, compute, is_valid)

    # ---- log-likelihood

    def _loglikelihood(self, asked: Mapping[str, tuple]) -> Iterator[tuple[str, list]]:
        decoded: dict[tuple[int, ...], GreedyText] = {}
        for key, spans, loglik in self._score({key: self._spans(*request) for key, request in asked.items()}):
            follows = [decoded.setdefault(tuple(before), GreedyText(self.lm, before)).begins_with(after) for before, after in spans]
            yield key, [loglik, all(follows)]

    def _rolling(self, asked: Mapping[str, tuple]) -> Iterator[tuple[str, float]]:
        spans = {key: self._windows(self.words.prefix, self.words.encode(text)) for key, (text,) in asked.items()}
        for key, _, loglik in self._score(spans):
            yield key, loglik

    def _spans(self, context: str, continuation: str) -> list[Span]:
        """Both are encoded as one text; spaces between them belong to the continuation, as in the harness."""
        before, after = self._encode_pair(context, continuation)
        if len(after) > self.lm.context:
            return self._windows(before[-1], after)
        return [(before[-(self.lm.context + 1 - len(after)) :], after)]  # the last token is predicted and not read

    def _encode_pair(self, context: str, continuation: str) -> Span:
        words, head = self.words, context.rstrip()
        before = words.encode(head) if context else []
        after = words.encode(context + continuation)[len(before) :] if before else words.encode_plain(context + continuation)
        if not before:
            return [words.prefix], after[1:] if after[:1] == [words.prefix] else after
        return before, after or words.encode_plain(continuation)  # empty where the boundary is inside a token

    def _windows(self, given: int, tokens_T: list[int]) -> list[Span]:
        utils = require("lm_eval.utils", "benchmarks")
        return [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(tokens_T, given, self.lm.context, 1)]

    def _score(self, spans: Mapping[str, list[Span]]) -> Iterator[tuple[str, list[Span], float]]:
        """Key, spans and log-likelihood of each request, the longest first: rows of similar length share a batch."""
        longest = {key: max((len(before) + len(after) for before, after in mine), default=1) for key, mine in spans.items()}
        order = sorted(spans, key=longest.__getitem__, reverse=True)
        place = 0
        while place < len(order):
            batch = order[place : place + max(1, TOKENS // longest[order[place]])]
            found = iter(self._rows([span for key in batch for span in spans[key]]))
            for key in batch:
                loglik = sum(next(found) for _ in spans[key])
                if not np.isfinite(loglik):
                    raise Damaged("the model's log-likelihoods are not finite: its weights are broken; train or download it again")
                yield key, spans[key], float(loglik)
            place += len(batch)
            self.progress("loglikelihood", place, len(order), "requests")

    def _rows(self, spans: Sequence[Span]) -> Iterator[float]:
        """Log-likelihood of the scored tokens of each span, nats."""
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
        words, wanted = self.words, self._settings(settings)
        eos, most = words.tokenizer.eos_token_id, wanted["max_gen_toks"]
        stops = [stop for stop in wanted["until"] if stop is not None]
        stops += [] if eos is None or (end := words.decode([eos])) in stops else [end]
        kept = self.lm.context - (most if most < self.lm.context else self.lm.context // 2)
        given = (words.encode(context) or [words.prefix])[-kept:]
        reach = {stop: len(words.encode_plain(stop)) + 2 for stop in stops}  # of the harness: a stop may be spelled in other tokens
        tokens: list[int] = []
        for step in self.generate(
            self.lm, words.tokenizer.backend_tokenizer, given, max_tokens=wanted.get("max_length", len(given) + most) - len(given),
            temperature=wanted.get("temperature", 1.0) if wanted["do_sample"] else 0.0, top_p=wanted.get("top_p", 1.0), rng_seed=nth,
            stops=words.ends,
        ):  # fmt: skip
            tokens.append(step.token)
            if any(stop in words.decode(tokens[-last:]) for stop, last in reach.items()):
                break
        text = words.decode(tokens, special=False)
        for stop in filter(None, stops):  # one after another, as in the harness
            text = text.split(stop)[0]
        return text

    def _settings(self, settings: dict) -> dict:
        """A task's settings of generation under the harness's own names. Raises BadInput."""
        wanted = require("lm_eval.models.utils", "benchmarks").normalize_gen_kwargs(settings, default_max_gen_toks=ANSWER)
        known = SAMPLING if wanted["do_sample"] else SAMPLING | IDLE
        foreign = [name for name in wanted if name not in known and not (name == "num_beams" and wanted[name] == 1)]
        if foreign:
            raise BadInput(f"a task sets {', '.join(foreign)}, and sampling here supports temperature and top_p only: leave the task out")
        return wanted


class GreedyText:
    """Greedy decoding after a context, one token at a time and only as far as needed."""

    def __init__(self, lm: "LM", before: list[int]):
        self.lm, self.unread, self.cache, self.tokens = lm, before, lm.start(), list[int]()

    def begins_with(self, after: Sequence[int]) -> bool:
        for t, token in enumerate(after):
            if t == len(self.tokens):
                logp_V, self.cache = self.lm.extend(self.unread, self.cache)
                self.unread = [int(logp_V.argmax())]
                self.tokens += self.unread
            if token != self.tokens[t]:
                return False
        return True


def adapter(reader: Reader) -> Any:
    """A model of the harness (lm_eval.api.model.LM). Raises MissingExtra."""
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
    """Tasks as the harness loads them, and the items to evaluate."""

    loaded: dict[str, Any]
    items: dict[str, list[int]]  # by task, ascending
    total: dict[str, int]
    digests: dict[str, str]  # of the items' content: equal for equal items


def forbid_downloads() -> None:
    """Keep tasks from fetching data. Call it before the libraries that read these variables are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")


def open_tasks(names: Sequence[str], folder: Path | None = None, limit: int | None = None) -> Tasks:
    """Load tasks and groups by name, from a folder of the harness's YAML files or from the harness's own.

    With a limit, the items with the smallest hashes of their content are used: the same for every model and every order of items. Tasks of
    a folder can run code, so use only your own folders. Raises MissingExtra, UnknownName, BadInput.
    """
    manager_of = require("lm_eval.tasks", "benchmarks").TaskManager
    if limit is not None and limit < 1:
        raise BadInput(f"the limit is {limit} items a task: choose one item or more, or leave the limit out for all")
    manager = manager_of(include_path=folder and str(folder), include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = manager_of(include_path=folder and str(folder))  # thousands of files
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UnknownName(f"no task {', '.join(unknown)} in the harness{f' or {folder}' if folder else ''}: check the spelling")
    random.seed(0)  # some tasks shuffle their choices while they load
    np.random.seed(1234)  # noqa: NPY002
    try:
        loaded = manager.load(list(names))
    except (OSError, ValueError, ImportError) as error:  # from the datasets library without a network
        raise BadInput(
            f"a task of {', '.join(names)} cannot be opened ({type(error).__name__}: {str(error).strip().splitlines()[0]}): data is "
            "fetched only with --download; allow it, or use a folder of tasks with local data"
        ) from error
    items, total, digests = {}, {}, {}
    for name, task in loaded["tasks"].items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        hashes = [_hash(item) for item in task.eval_docs]
        items[name] = sorted(sorted(range(len(hashes)), key=lambda place: (hashes[place], place))[:limit])
        total[name], digests[name] = len(hashes), fingerprint(sorted(hashes[place] for place in items[name]))
    return Tasks(loaded, items, total, digests)


def _hash(item: Any) -> str:
    return hashlib.sha256(f"items:{json.dumps(item, sort_keys=True, default=repr)}".encode()).hexdigest()


def benchmark(tasks: Tasks, reader: Reader) -> dict[str, Any]:
    """One model's results: of each task its version, items and metrics with standard errors; of each group its metrics."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # else it forks this process, which has threads, for its bootstrap
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)  # of the harness; again for each model, so that all see the same examples
    with redirect_stdout(sys.stderr):  # it prints to stdout
        found = require("lm_eval", "benchmarks").evaluate(
            lm=adapter(reader), task_dict=tasks.loaded, samples=tasks.items, bootstrap_iters=1000, log_samples=False
        )
    return {
        "lm_eval": version("lm_eval"),
        "bos": reader.words.facts(),
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
        "not_applied": dict(reader.words.unlike)
        if any(task.OUTPUT_TYPE == "generate_until" for task in tasks.loaded["tasks"].values())
        else {},
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
