"""The two tasks of this room: a seed from a corpus, an expert from a seed. Named by their inputs, so done once and resumed."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from elmwood.corpus.build import documents
from elmwood.corpus.tokens import pack, train_tokenizer
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model, load_quantised, new_model, save_folder, save_seed
from elmwood.records import Corpus, Digest, Expert, Files, Recipe, Record, Seed, Shape, Shard
from elmwood.store import Store
from elmwood.train.adapter import adapter
from elmwood.train.loop import Trained, run
from elmwood.train.task_names import seed_key, train_key
from elmwood.train.trackers import followed

END = 0  # token id of a trained tokenizer's <|endoftext|>
SAMPLE = 50_000_000  # bytes of text a tokenizer is trained on


def train_seed(corpus: Corpus, shape: Shape, recipe: Recipe, store: Store, *, name: str = "seed", progress: Progress = silent) -> Seed:
    """A Llama and its tokenizer from nothing but text. Done once per inputs; a run cut short goes on. Raises BadInput, BadCorpus."""
    if recipe.method != "full":
        raise BadInput(f"a seed is trained with method 'full', not {recipe.method!r}: adapters need a seed to stand on")
    check_length(recipe, shape.context)
    key = seed_key(corpus, shape, recipe, name)
    with store.held(key) as work:
        if done := store.done(key):
            return store.load(done, Seed)
        words = _tokenizer(corpus, shape.vocabulary, store, work / "tokenizer.json", progress)
        packed = pack(corpus.train, words, END, store, progress)
        model = new_model(shape, recipe.rng_seed)
        trained = run(model, packed, recipe, work, partial(store.log, key), progress)
        facts: dict[str, Any] = {"corpus": corpus.digest, "recipe": recipe, "curve": trained.curve}
        seed = save_seed(model, words, store, name=name, separator=END, **facts)
        finish(store, key, seed, recipe, trained)
        return seed


def train(
    seed: Seed, data: Sequence[Shard], recipe: Recipe, store: Store, *, partition: Digest | None = None, domain: int | None = None,
    device: torch.device | str | None = None, progress: Progress = silent, report_to: Sequence[str] = (),
) -> Expert:  # fmt: skip
    """Branch the seed and train it on shards. Done once per inputs; a run cut short goes on. Raises BadInput, BadCorpus, MissingExtra.

    `report_to` names trackers that are told the points of the curve too: tensorboard, trackio, wandb, mlflow. The bytes stay the same.
    """
    check_length(recipe, seed.context)
    key = train_key(seed, data, recipe, partition, domain)
    with store.held(key) as work:
        if done := store.done(key):
            return store.load(done, Expert)
        words = tokenizer(seed, store)
        packed = pack(data, words, seed.separator, store, progress)
        model = opened(seed, recipe, store, device)
        with reported(store, seed, key, recipe, domain, report_to) as log:
            trained = run(model, packed, recipe, work, log, progress)
        expert = Expert(
            seed=seed.digest, partition=partition, domain=domain, data=tuple(shard.blob for shard in data), recipe=recipe,
            files=saved(model, words, recipe, store), curve=trained.curve,
        )  # fmt: skip
        finish(store, key, expert, recipe, trained)
        return expert


@contextmanager
def reported(
    store: Store, seed: Seed, key: str, recipe: Recipe, domain: int | None, report_to: Sequence[str]
) -> Iterator[Callable[..., None]]:  # fmt: skip
    """The log of a task, which the trackers hear of too."""
    label = f"{seed.name}-{'pooled' if domain is None else domain}-{key[:8]}"
    with followed(report_to, store.root / "logs" / "runs", label, recipe) as tell:

        def log(**facts: Any) -> None:
            store.log(key, **facts)
            tell(**facts)

        yield log


def opened(seed: Seed, recipe: Recipe, store: Store, device: torch.device | str | None = None) -> Any:
    """The seed as this recipe trains it: whole, or frozen (in four bits for qlora) with an adapter. Raises BadInput, MissingExtra."""
    if recipe.method == "full":  # float32 everywhere: in bf16 small updates would be rounded away
        return load_model(seed, store, device=device, dtype=torch.float32)
    base = load_quantised(seed, store, device) if recipe.method == "qlora" else load_model(seed, store, device=device)
    return adapter(base, recipe, seed.digest)


def saved(model: Any, words: Tokenizer, recipe: Recipe, store: Store) -> Files:
    """What was trained, stored: a transformers checkpoint folder, or a PEFT adapter folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if recipe.method == "full":
            save_folder(model, words, folder)
        else:
            model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            settings = json.loads((folder / "adapter_config.json").read_text())
            settings["target_modules"].sort()  # a set in PEFT, whose order changes from process to process
            (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True))
        return store.put_folder(folder)


def finish(store: Store, key: str, record: Record, recipe: Recipe, trained: Trained, **more: float) -> None:
    """Log what a task took, and mark it done."""
    able = {what: str(has).lower() for what, has in trained.able._asdict().items()}
    store.log(
        key, event="done", seconds=round(trained.seconds, 3), saving=round(trained.saving, 3),
        tokens=trained.steps * recipe.batch * recipe.length, threads=recipe.threads, **more, **able,
    )  # fmt: skip
    store.finish(key, record)


def check_length(recipe: Recipe, context: int) -> None:
    """Rows must be within a model's positions. Raises BadInput."""
    if recipe.length > context:
        raise BadInput(f"rows of {recipe.length} tokens are longer than the {context} positions of the model: ask for a length within them")


def _tokenizer(corpus: Corpus, vocabulary: int, store: Store, path: Path, progress: Progress) -> Tokenizer:
    """Trained once, kept while the seed is unfinished."""
    if not path.exists():
        texts = _sample((document.text for document in documents(corpus.train, store)), min(SAMPLE, corpus.bytes), progress)
        train_tokenizer(texts, vocabulary).save(f"{path}.tmp")
        path.with_name(f"{path.name}.tmp").replace(path)
    return Tokenizer.from_file(str(path))


def _sample(texts: Iterable[str], size: int, progress: Progress) -> Iterator[str]:
    """The first texts, up to so many bytes together: a corpus is stored in the order of its content hashes."""
    done = 0
    for text in texts:
        if done >= size:
            return
        yield text
        done += len(text.encode())
        progress("train the tokenizer", done, size, "bytes")
