"""Models and adapters of known shapes with random weights, for the benches."""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benches.common import say
from elmwood.corpus.tokens import train_tokenizer
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.lm.load import save_seed
from elmwood.merge.statistics import find_statistics
from elmwood.records import Expert, Recipe, Seed
from elmwood.store import Store
from elmwood.train.statistics import statistics

SHAPES = {  # hidden size, feed-forward, layers, heads, key-value heads, vocabulary
    "17M": (384, 1024, 8, 6, 6, 4096),
    "135M": (576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
}


def model(shape: str) -> PreTrainedModel:
    width, feed_forward, layers, heads, groups, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    ).eval()


def seed(shape: str, store: Store) -> Seed:
    words = train_tokenizer(["the cat sat on the mat"], 300)
    return save_seed(model(shape), words, store, name=shape, separator=0)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter_folders(base: PreTrainedModel, count: int, rank: int, folder: Path, late: float = 1.0) -> list[Path]:
    """PEFT adapter folders for all linear layers, or those of the last share of the layers, with random numbers. Unloads what PEFT added to
    the base."""
    layers = base.config.num_hidden_layers
    last = list(range(layers - math.ceil(late * layers), layers))
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=16, target_modules=LINEAR, layers_to_transform=last, layers_pattern="layers",
    )  # fmt: skip
    wrapped = get_peft_model(base, config)
    wrapped.save_pretrained(folder / "0")
    wrapped.unload()
    (weights,) = (folder / "0").glob("*.safetensors")
    like = _shapes(weights)
    for number in range(count):
        made = folder / str(number)
        made.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        save_file(
            {name: 0.02 * torch.randn(size, generator=generator) for name, size in like.items()}, made / weights.name, {"format": "pt"}
        )
        (made / "adapter_config.json").write_bytes((folder / "0" / "adapter_config.json").read_bytes())
    return [folder / str(number) for number in range(count)]


def _shapes(weights: Path) -> dict[str, list[int]]:
    with safe_open(weights, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (not a dict)


def experts(seed: Seed, base: PreTrainedModel, count: int, rank: int, store: Store, late: float = 1.0, **fields) -> list[Expert]:
    """LoRA experts, with adapters in the last share of the layers; expert n is of domain n where a partition is given."""
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for number, path in enumerate(adapter_folders(base, count, rank, Path(folder), late)):
            place = {"domain": number} if fields else {}
            recipe = Recipe(method="lora", steps=1, rank=rank, late=late)
            made.append(Expert(seed=seed.digest, data=(), recipe=recipe, files=store.put_folder(path), **fields, **place))
            store.add(made[-1])
        return made


def leave_statistics(experts: Sequence[Expert], *, store: Store, rows: int, progress: Progress = silent) -> None:
    """Statistics for experts that have none."""
    for expert in experts:
        try:
            find_statistics(expert.digest, store)
        except BadInput:
            statistics(expert, store, rows=rows, progress=progress)


class Spent(NamedTuple):
    """Seconds: wall is what a user waits, cpu (of this process) is what can be compared on a busy machine."""

    wall: float
    cpu: float


def spent(task: Callable[[], object], times: int = 1) -> Spent:
    """Seconds of a task that does something `times` times, for one of them."""
    wall, cpu = perf_counter(), process_time()
    task()
    return Spent((perf_counter() - wall) / times, (process_time() - cpu) / times)


def rounds(tasks: dict[str, Callable[[], Spent]], count: int) -> dict[str, list[Spent]]:
    """What each task returns, `count` times, in turn, after a round to warm up."""
    found: dict[str, list[Spent]] = {name: [] for name in tasks}
    for number in range(count + 1):
        for name, task in tasks.items():
            value = task()
            if number:
                found[name].append(value)
    return found


def say_rounds(bench: str, found: dict[str, list[Spent]], peers: tuple[str, ...] = (), **about: object) -> None:
    """A JSON line for each task: median seconds, and medians of the ratio to each peer within a round."""
    for name, values in found.items():
        line: dict[str, object] = {"seconds": median(value.wall for value in values), "cpu": median(value.cpu for value in values)}
        for peer in peers:
            pairs = list(zip(values, found[peer], strict=True))
            line[f"of {peer}"] = median(mine.wall / its.wall for mine, its in pairs)
            line[f"cpu of {peer}"] = median(mine.cpu / its.cpu for mine, its in pairs)
        say(bench, **about, way=name, **line)
