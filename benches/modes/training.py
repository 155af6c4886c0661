"""What a step of training costs with adapters in the last layers only: nothing is kept, and no gradient computed, below the first of them.

    python -m benches.modes.training [--shape 17M] [--rank 16] [--rows 4] [--length 256] [--late 1,0.5,0.25] [--rounds 5] [--threads 1]

A step of AdamW over the same rows, and its forward pass alone, for each share of the layers. One JSON line each, with ratios to the step of
the first share; then the bytes that the forward pass keeps for the backward pass.
"""

import numpy as np
import torch

from benches.common import numbers, parser, say
from benches.models import SHAPES, model, rounds, say_rounds, spent
from elmwood.records import Recipe
from elmwood.train.adapter import add_adapter
from elmwood.train.data import Batch
from elmwood.train.loop import adamw, add_gradients, batch_loss, update_weights
from elmwood.train.loss import find_abilities


def kept_bytes(run) -> int:
    """What autograd keeps while `run` runs, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="17M")
    options.add_argument("--late", default="1,0.5,0.25")
    for name, value in (("rank", 16), ("rows", 4), ("length", 256), ("rounds", 5), ("threads", 1)):
        options.add_argument(f"--{name}", type=int, default=value)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    rows_BL = np.random.default_rng(0).integers(0, SHAPES[asked.shape][5], (asked.rows, asked.length + 1))
    batch = Batch(rows_BL[:, :-1], rows_BL[:, 1:], np.tile(np.arange(asked.length), (asked.rows, 1)))
    tasks, kept = {}, {}
    for late in numbers(asked.late):
        recipe = Recipe(method="lora", rank=asked.rank, late=late, steps=1 << 20, batch=asked.rows, length=asked.length)
        adapted = add_adapter(model(asked.shape), recipe, "seed").train()
        weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        able, optimizer = find_abilities(adapted), adamw(weights, recipe)

        def step(adapted=adapted, able=able, optimizer=optimizer, recipe=recipe) -> None:
            add_gradients(adapted, able, batch, recipe)
            update_weights(optimizer, recipe, 0)

        def forward(adapted=adapted, able=able) -> None:
            with torch.no_grad():
                batch_loss(adapted, able, batch)

        kept[late] = kept_bytes(lambda adapted=adapted, able=able: batch_loss(adapted, able, batch))
        tasks[f"step, {late:g}"] = lambda step=step: spent(step)
        tasks[f"forward, {late:g}"] = lambda forward=forward: spent(forward)
    first = numbers(asked.late)[0]
    about = {"shape": asked.shape, "rank": asked.rank, "tokens": asked.rows * asked.length, "threads": asked.threads}
    say_rounds("late", rounds(tasks, asked.rounds), (f"step, {first:g}",), **about)
    for late, size in kept.items():
        say("late, kept", late=late, bytes=size, of_first=size / kept[first])


if __name__ == "__main__":
    main()
