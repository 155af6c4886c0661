"""What training really takes: two steps of it in a process of its own. `fit` predicts, this looks.

python -m elmwood.train.fit.measure STORE SEED-OR-MIXTURE RECIPE DEVICE
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from elmwood.corpus.tokens import Packed
from elmwood.errors import BadInput, DoesNotFit
from elmwood.lm.load import add_seed
from elmwood.lm.pretrained import new_model_of
from elmwood.records import Mixture, Recipe, Seed
from elmwood.store import Store
from elmwood.train import loop, router, together
from elmwood.train.fit.formulas import resident_memory
from elmwood.train.tasks import open_trainable

STEPS = 2
DOCUMENT = 700  # tokens of each


class Measured(NamedTuple):
    """A run of two steps."""

    peak: int  # bytes, including opening the seed
    held: int  # bytes of the process before that, for its imports; 0 on a GPU
    tokens_per_second: float  # of the second step; on a CPU by process time, so that other processes do not count


def measure(seed: Seed | Mixture | Any, recipe: Recipe, store: Store | None = None, device: str = "cpu") -> Measured:
    """Train two steps on random tokens, from a seed, a mixture, or a config with random weights in a temporary folder.

    Raises DoesNotFit if the process was killed or ran out of memory, BadInput if it failed otherwise.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if not isinstance(seed, Seed | Mixture):
            store = Store(Path(scratch))
            seed = random_seed(seed, store)
        recipe = recipe.model_copy(update={"steps": STEPS, "patience": None})
        result = Path(scratch) / "measured.json"
        words = [str(Store(store).root), seed.digest, recipe.model_dump_json(), device, str(result)]
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", __spec__.name, *words], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"killed, status {done.returncode}"])[-1]
            if done.returncode < 0 or "memory" in last.lower():
                raise DoesNotFit(f"two steps of this recipe did not finish ({last}): ask for less, as `elmwood fit` says")
            raise BadInput(f"two steps of this recipe did not finish: {last}")
        return Measured(**json.loads(result.read_text(encoding="utf-8")))


def random_seed(config: Any, store: Store) -> Seed:
    """A checkpoint of this config with random weights and no tokenizer: enough to train on random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        model: Any = new_model_of(config, getattr(config, "dtype", None) or torch.float32)
        model.save_pretrained(folder)
        files = store.put_folder(Path(folder))
    return add_seed(store, files, model.config, model.num_parameters(), name="random", separator=0)


def predict_peak(components: dict[str, int], found: Measured) -> int:
    """The predicted peak of the process that was measured, which has other imports than this one."""
    return sum(components.values()) - components["process"] + found.held


def take(start: Seed | Mixture, recipe: Recipe, store: Store, device: str) -> Measured:
    """Train in this process."""
    seed = store.load(start.seed, Seed) if isinstance(start, Mixture) else start
    rng, size = np.random.default_rng(0), recipe.batch * (recipe.length + 1) + 2 * DOCUMENT
    texts = [
        Packed(rng.integers(1, seed.vocabulary, size).astype(np.uint32), np.arange(0, size, DOCUMENT), 0) for _ in range(recipe.together)
    ]
    held = resident_memory() if device == "cpu" else 0
    model = router.open_mixture(start, store, device) if isinstance(start, Mixture) else open_trainable(seed, recipe, store, device)
    marks: list[float] = []

    def tick(what: str, done: float, total: float, unit: str) -> None:
        if unit != "tokens":  # the end of a step; other events come between
            return
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter() if device == "cuda" else time.process_time() / recipe.threads)

    with tempfile.TemporaryDirectory() as work:
        if isinstance(start, Mixture):
            router.select_trained(model, recipe.tuned)
            with router.watch_routers(model, recipe.balance) as watch:
                loop.run(model, texts[0], recipe, Path(work), lambda **_: None, tick, watch.balance)
        elif recipe.together > 1:
            together.run(model, texts, recipe, Path(work), lambda *_, **__: None, tick)
        else:
            loop.run(model, texts[0], recipe, Path(work), lambda **_: None, tick)
    step = max(marks[1] - marks[0], 1e-3)  # some systems measure process time in milliseconds
    speed = recipe.together * recipe.batch * recipe.length / step
    return Measured(peak(device), held, speed)


def peak(device: str) -> int:
    """Bytes. CPU: the peak of this process. CUDA: the peak that torch reserved, the context, and what other processes hold."""
    if device == "cuda":
        free, there = torch.cuda.mem_get_info()
        return there - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    place, digest, plan, kind, path = sys.argv[1:]
    home = Store(place)
    given = home.load(digest)
    assert isinstance(given, Seed | Mixture)
    Path(path).write_text(json.dumps(take(given, Recipe.model_validate_json(plan), home, kind)._asdict()), encoding="utf-8")
