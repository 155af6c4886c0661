"""A training step on a CPU with matrix units (AMX): in float32, in bf16, and in bf16 with attention in float32.

    python -m benches.speed.precision [--shapes 64x2x8x64,...] [--rounds 9]

A shape is width x layers x rows x tokens of a row; heads are 32 wide, the vocabulary has 2,048 words, and there is one thread. CPU ms of a
step, medians over rounds in which all ways are measured in turn. `chosen` is the way that training takes by itself.
"""

from contextlib import nullcontext
from itertools import chain
from statistics import median
from time import process_time

import torch

from benches.common import parser, say, words
from elmwood.lm.load import new_model
from elmwood.records import Recipe, Shape
from elmwood.train.card.attention import FLOAT32, attending
from elmwood.train.card.path import fast_path
from elmwood.train.card.precision import autocasts
from elmwood.train.loop import adamw

WAYS = {"float32": (False, "sdpa"), "bf16": (True, "sdpa"), "bf16, attention float32": (True, FLOAT32)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", type=words, default=["64x2x8x64", "96x3x4x256", "128x4x4x256", "256x4x4x256", "256x4x1x1024"])
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    for shape in given.shapes:
        width, layers, batch, length = map(int, shape.split("x"))
        form = Shape(
            layers=layers, width=width, heads=max(1, width // 32), feed_forward=8 * width // 3, vocabulary=2048, context=length
        )  # fmt: skip
        model, recipe = new_model(form).train(), Recipe(steps=1, batch=batch, length=length)
        step, ids_BL = adamw(dict(model.named_parameters()), recipe), torch.randint(2048, (batch, length))
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for way, (low, attention) in chain.from_iterable([WAYS.items()] * (given.rounds + 1)):
            began = process_time()
            with attending(model, attention) if attention != "sdpa" else nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    loss = model(input_ids=ids_BL, labels=ids_BL).loss
                loss.backward()
            step.step()
            step.zero_grad()
            taken[way].append(process_time() - began)
        with fast_path(model, recipe):
            attends = model.config._attn_implementation
        chosen = next(way for way, how in WAYS.items() if how == (autocasts(model, cpu), attends))
        found = {way: 1000 * median(times[1:]) for way, times in taken.items()}
        say("speed.precision", shape=shape, chosen=chosen, gain=found["float32"] / found[chosen], **found)


if __name__ == "__main__":
    main()
