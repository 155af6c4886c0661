"""Two tasks: a seed from a corpus, an expert from a seed. They are named by their inputs, so each is done once, and resumes."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tokenizers import Tokenizer

from elmwood.corpus.build import documents
from elmwood.corpus.tokens import load_tokenizer, pack, train_tokenizer
from elmwood.engine import NOTE, Progress, silent
from elmwood.errors import BadInput, MissingExtra
from elmwood.lm.devices import choose_device
from elmwood.lm.files import tokenizer
from elmwood.lm.importing.config import context_of
from elmwood.lm.load import load_model, load_quantised, new_model, new_model_like, save_folder, save_seed
from elmwood.lm.probe import say
from elmwood.records import Corpus, Digest, Expert, Files, Portion, Recipe, Record, Seed, Shape, Shard
from elmwood.registry import require
from elmwood.store import Store
from elmwood.store.disk import write_whole
from elmwood.train.adapter import add_adapter
from elmwood.train.card.processes import ALONE, Group, join
from elmwood.train.checkpoint import Position
from elmwood.train.loop import Trained, run
from elmwood.train.seeds.shapes import with_vocabulary
from elmwood.train.seeds.stream import Source, Stream
from elmwood.train.task_names import seed_key, start_key, tokenizer_key, train_key
from elmwood.weights.experts import seed_places

END = 0  # token id of a trained tokenizer's <|endoftext|>
TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}  # and the module that each needs
DEFAULT_VOCABULARY = 32_768  # of a config that names none
SAMPLE = 50_000_000  # bytes of text that a tokenizer is trained on


def train_seed(
    corpora: Corpus | Sequence[Source], shape: Shape | Mapping[str, Any], recipe: Recipe, store: Store, *, name: str = "seed",
    device: torch.device | str | None = None, keep_every: int | None = None, kept: Callable[[Seed], object] = lambda seed: None,
    group: Group = ALONE, progress: Progress = silent,
) -> Seed:  # fmt: skip
    """Train a causal LM and its tokenizer from scratch. Done once per inputs; interrupted runs resume. Raises BadInput, BadCorpus, BadSeed.

    `corpora`: one, or several with the shares of the rows that are cut from each. `shape`: a Llama, or a config of transformers, whose
    `vocab_size` is the most that the tokenizer gets. After every `keep_every` steps the model is stored as a seed of its own, and
    `kept` is called with it. `group`: the processes that call this together.
    """
    if recipe.method != "full":
        raise BadInput(f"a seed is trained with method 'full', not {recipe.method!r}: adapters need a seed")
    sources = [Source(corpora)] if isinstance(corpora, Corpus) else list(corpora)
    key = seed_key(sources, shape, recipe, name, keep_every)
    progress = progress if group.first else silent
    with group.held(store, key, progress) as work:
        if done := group.tell(store.done(key)):
            return store.load(done, Seed)
        if group.first:
            _tokenizer(sources, _most_words(shape), store, progress)
        group.wait()
        words = _tokenizer(sources, _most_words(shape), store, progress)
        model: Any = make_model(shape, words, recipe.rng_seed)
        check_length(recipe, context_of(model.config) or recipe.length)
        model.to(group.device or choose_device(device))
        stream = Stream(sources, words, END, recipe, store, progress)
        facts: dict[str, Any] = {"corpus": sources[0].corpus.digest, "recipe": recipe, "name": name, "separator": END}
        if len(sources) > 1:
            whole = sum(source.weight for source in sources)
            facts["mix"] = tuple(Portion(corpus=source.corpus.digest, weight=source.weight / whole) for source in sources)
        if keep_every:
            facts["run"] = key[:16]

        def keep(whole: Any, position: Position) -> None:
            kept(save_seed(whole, words, store, curve=position.curve, step=position.step, **facts))

        log = partial(store.log, key) if group.first else ignore
        if group.first:
            for read in stream.reads():
                progress(f"reads {'' if read.exact else 'about '}{read.epochs:.2g} epochs of corpus {read.corpus[:8]}", 0, 0, NOTE)
        trained = run(model, stream, recipe, work, log, progress, group=group, keep=keep, keep_every=keep_every)
        if group.first:
            seed = save_seed(trained.model, words, store, curve=trained.curve, **facts)
            for read in stream.reads():
                store.log(key, event="read", **read._asdict())
            finish(store, key, seed, recipe, trained)
        group.wait()
        return seed if group.first else store.load(str(store.done(key)), Seed)


def start_seed(
    corpora: Corpus | Sequence[Source], shape: Shape | Mapping[str, Any], rng_seed: int, store: Store, *, name: str = "seed",
    progress: Progress = silent,
) -> Seed:  # fmt: skip
    """A seed before its first step: random weights, and a tokenizer trained on the corpora. Raises BadCorpus, BadSeed."""
    sources = [Source(corpora)] if isinstance(corpora, Corpus) else list(corpora)
    key = start_key(sources, shape, rng_seed, name)
    with store.held(key, progress):
        if done := store.done(key):
            return store.load(done, Seed)
        words = _tokenizer(sources, _most_words(shape), store, progress)
        seed = save_seed(make_model(shape, words, rng_seed), words, store, name=name, separator=END, corpus=sources[0].corpus.digest)
        store.finish(key, seed)
        return seed


def _most_words(shape: Shape | Mapping[str, Any]) -> int:
    return shape.vocabulary if isinstance(shape, Shape) else int(shape.get("vocab_size") or DEFAULT_VOCABULARY)


def make_model(shape: Shape | Mapping[str, Any], words: Tokenizer, rng_seed: int) -> Any:
    """A model with random weights. A config's vocabulary becomes that of the tokenizer. Raises BadSeed."""
    if isinstance(shape, Shape):
        return new_model(shape, rng_seed)
    return new_model_like(with_vocabulary(dict(shape), words.get_vocab_size(with_added_tokens=True)), rng_seed)


def ignore(**_: Any) -> None:
    """Events of a process whose run another one logs."""


def train(
    seed: Seed, data: Sequence[Shard], recipe: Recipe, store: Store, *, partition: Digest | None = None, domain: int | None = None,
    device: torch.device | str | None = None, progress: Progress = silent, report_to: Sequence[str] = (),
) -> Expert:  # fmt: skip
    """Branch the seed and train it on shards. Done once per inputs; interrupted runs resume. Raises BadInput, BadCorpus, MissingExtra.

    `report_to` names trackers that get the points of the curve too: tensorboard, trackio, wandb, mlflow. They do not change the result.
    Under torchrun or Ray Train all processes call this, and train the expert together (DDP).
    """
    check_length(recipe, seed.context)
    key, group = train_key(seed, data, recipe, partition, domain), join()
    progress = progress if group.first else silent
    with group.held(store, key, progress) as work:
        if done := group.tell(store.done(key)):
            return store.load(done, Expert)
        words = tokenizer(seed, store)
        packed = pack(data, words, seed.separator, store, progress)
        model = open_trainable(seed, recipe, store, group.device or device, progress)
        with open_log(store, seed, key, recipe, domain, report_to) if group.first else nullcontext(ignore) as log:
            trained = run(model, packed, recipe, work, log, progress, group=group)
        if group.first:
            (said,) = said_by(trained.model, recipe, seed)
            expert = Expert(
                seed=seed.digest, partition=partition, domain=domain, data=tuple(shard.blob for shard in data), recipe=recipe,
                files=store_trained(trained.model, words, recipe, store), curve=trained.curve, probe=said,
            )  # fmt: skip
            finish(store, key, expert, recipe, trained)
        group.wait()
        return expert if group.first else store.load(str(store.done(key)), Expert)


@contextmanager
def open_log(
    store: Store, seed: Seed, key: str, recipe: Recipe, domain: int | None, report_to: Sequence[str]
) -> Iterator[Callable[..., None]]:  # fmt: skip
    """A function that logs an event of a task, to the store and to trackers."""
    label = f"{seed.name}-{'pooled' if domain is None else domain}-{key[:8]}"
    with open_trackers(report_to, store.root / "logs" / "runs", label, recipe) as track:

        def log(**facts: Any) -> None:
            store.log(key, **facts)
            track(**facts)

        yield log


def open_trainable(
    seed: Seed, recipe: Recipe, store: Store, device: torch.device | str | None = None, progress: Progress = silent
) -> Any:  # fmt: skip
    """The model that this recipe trains: the seed itself, or the frozen seed (in four bits for qlora) with an adapter.
    Raises BadInput, MissingExtra."""
    progress(f"trains on {choose_device(device)}", 0, 0, NOTE)
    if recipe.method == "full":  # float32: in bf16 small updates would be rounded away
        return load_model(seed, store, device=device, dtype=torch.float32)
    if recipe.method == "qlora":
        base = load_quantised(seed, store, device)
    else:  # frozen: bf16 on a GPU, whatever it is stored in
        place = choose_device(device)
        base = load_model(seed, store, device=place, dtype=None if place.type == "cpu" else torch.bfloat16)
    places = seed_places(seed, store)
    adapted = add_adapter(base, recipe, seed.digest, places, progress)
    # the seed's word, as others read it: bitsandbytes turns the matrices of GPT-2 round
    adapted.peft_config["default"].fan_in_fan_out = any(place.turned for place in places.values())
    return adapted


def store_trained(model: Any, words: Tokenizer, recipe: Recipe, store: Store) -> Files:
    """Store what was trained: a transformers checkpoint folder, or a PEFT adapter folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if recipe.method == "full":
            save_folder(model, words, folder)
        else:
            model.create_or_update_model_card = lambda _: None  # PEFT's empty card takes longer to make than the adapter to save
            model.save_pretrained(folder, save_embedding_layers=False)
            settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            settings["target_modules"].sort()  # a set in PEFT, whose order changes from process to process
            (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
        return store.put_folder(folder)


def said_by(model: Any, recipe: Recipe, seed: Seed, rows: int = 1) -> list[tuple[float, ...]]:
    """What a trained adapter says after a fixed text (lm/probe.py), of experts that were trained together in one row for each. Only LoRA is
    served by adapters, and over a seed in four bits it says something else."""
    return say(model, seed.vocabulary, seed.context, rows) if recipe.method == "lora" else [()] * rows


def finish(store: Store, key: str, record: Record, recipe: Recipe, trained: Trained, **more: float) -> None:
    """Log the time and size of a task, and mark it done."""
    able = {what: str(has).lower() for what, has in trained.able._asdict().items()}
    store.log(
        key, event="done", seconds=round(trained.seconds, 3), saving=round(trained.saving, 3),
        tokens=trained.steps * recipe.batch * recipe.length, threads=recipe.threads, **more, **able,
    )  # fmt: skip
    store.log(record.digest, trained_on=trained.place)
    store.finish(key, record)


def check_length(recipe: Recipe, context: int) -> None:
    """A row must fit in a model's context. Raises BadInput."""
    if recipe.length > context:
        raise BadInput(f"--length {recipe.length}: the model has {context} positions; choose --length {context}")


def _tokenizer(sources: Sequence[Source], vocabulary: int, store: Store, progress: Progress) -> Tokenizer:
    """Trained once for the same text and size, however many seeds use it. Corpora have the parts in it that they have in the training."""
    path = store.root / "work" / tokenizer_key(sources, vocabulary) / "tokenizer.json"
    if not path.exists():
        whole = sum(source.weight for source in sources)
        texts = chain.from_iterable(
            _sample(
                (document.text for document in documents(corpus.train, store)),
                min(int(SAMPLE * weight / whole), sum(shard.bytes for shard in corpus.train)),
                progress,
            )
            for corpus, weight in sources
        )
        write_whole(path, train_tokenizer(texts, vocabulary).to_str(pretty=True).encode())
    return load_tokenizer(path.parent)


def _sample(texts: Iterable[str], size: int, progress: Progress) -> Iterator[str]:
    """The first texts, up to so many bytes together: a corpus is stored in the order of its content hashes."""
    done = 0
    for text in texts:
        if done >= size:
            return
        yield text
        done += len(text.encode())
        progress("train the tokenizer", done, size, "bytes")


# ---- trackers: training in other people's viewers. Nothing of it enters a recipe, so the bytes are the same ------


@contextmanager
def open_trackers(names: Sequence[str], folder: Path, run: str, recipe: Recipe) -> Iterator[Callable[..., None]]:
    """A function that takes the events of a training log and sends the numbers of its points to these trackers.

    Files of a tracker go below `folder`. Raises BadInput, MissingExtra.
    """
    for name in names:
        if name not in TRACKERS:
            raise BadInput(f"--report-to {name}: no such tracker; choose among {', '.join(TRACKERS)}")
        require(TRACKERS[name], name)
        if name not in {str(found) for found in get_available_trackers()}:
            raise MissingExtra(f"accelerate finds no {name}, though it is installed: upgrade both, pip install -U accelerate {name}")
    if not names:
        yield lambda **_: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder)  # only for its trackers
    accelerator.init_trackers(run, {what: str(value) for what, value in recipe.model_dump().items()})

    def log(event: str, **facts: Any) -> None:
        if event == "point":
            accelerator.log({what: value for what, value in facts.items() if what != "step"}, step=facts["step"])

    try:
        yield log
    finally:
        accelerator.end_training()
