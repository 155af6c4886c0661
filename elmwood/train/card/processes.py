"""One run on several processes, which torchrun or Ray Train started: each takes its rows of every batch, and gradients are summed.

DDP: each process has the whole model. FSDP2: each has a part of every weight, gradient and moment. Checkpoints and results are those of
one process, so a run may go on with another number of them.
"""

import atexit
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from elmwood.engine import Progress, processes
from elmwood.errors import BadInput
from elmwood.lm.devices import best_device
from elmwood.store import Store
from elmwood.train.card.compiled import layers_of

CHECK = 10  # steps between two questions to the first process whether it is time for a checkpoint


class Group(NamedTuple):
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    sharded: bool = False  # FSDP2
    device: torch.device | None = None  # None: as the caller chooses

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(device_ids=None if self.device is None or self.device.index is None else [self.device.index])

    def tell(self, value: Any) -> Any:
        """What the first process says, a JSON value, to all."""
        if self.size == 1:
            return value
        said = torch.tensor([*json.dumps(value).encode()], dtype=torch.uint8, device=self.device)
        size = torch.tensor([len(said)], device=self.device)
        dist.broadcast(size, 0)
        said = said if self.first else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(said, 0)
        return json.loads(bytes(said.tolist()))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, a new tensor."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    @contextmanager
    def held(self, store: Store, key: str, progress: Progress) -> Iterator[Path]:
        """The work folder of a task: the first process holds it for all."""
        if self.first:
            with store.held(key, progress) as work:
                self.wait()
                yield work
        else:
            self.wait()
            yield store.work(key)

    def once(self, make: Callable[[], str]) -> str:
        """What the first process makes, such as a digest; the others wait."""
        return self.tell(make() if self.first else None)


ALONE = Group()


def join(sharded: bool = False) -> Group:
    """The processes that torchrun or Ray Train started with this one; only this one where they did not. They stay together until this
    process ends. Raises BadInput."""
    if processes()[1] == 1:
        if sharded:
            raise BadInput("--sharded divides a model among processes, and this is the only one: start several with torchrun")
        return ALONE
    if not dist.is_initialized():
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # accelerate would choose a number, and warn
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    state = PartialState(cpu=best_device().type == "cpu")  # the process group; a GPU for each process of a machine
    return Group(state.process_index, state.num_processes, sharded, state.device)


# ---- a model on them ---------------------------------------------------------------------------------------------


class Scored(nn.Module):
    """Rows -> loss as one forward pass, which DDP and FSDP2 hook into."""

    def __init__(self, model: Any, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *rows: Any) -> Tensor:
        return self.loss(self.model, *rows)


class Spread(NamedTuple):
    """A model on a group of processes."""

    score: Callable[..., Tensor]  # rows -> loss; its backward pass ends with the mean of the gradients of all processes
    model: Any  # with whole weights: where they are divided, a copy on the first process, None on the others
    group: Group

    def gather(self, weights: dict[str, Tensor]) -> Any:
        """The model with its present weights whole, where this process has one. All processes call it."""
        if not self.group.sharded:
            return self.model
        own = {} if self.model is None else dict(self.model.named_parameters())
        for name, weight in weights.items():
            whole = full(weight)
            if own:
                own[name].data.copy_(whole)
        return self.model


def spread_over(group: Group, model: Any, loss: Callable[..., Tensor]) -> Spread:
    """Let a model's rows be scored by a group. `loss` takes the model and the rows. With FSDP2 the model is divided in place."""
    scored = Scored(model, loss)
    if group.size == 1:
        return Spread(scored.forward, model, group)
    if not group.sharded:
        return Spread(DistributedDataParallel(scored, gradient_as_bucket_view=True), model, group)
    whole = deepcopy(model).cpu() if group.first else None
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(scored)
    return Spread(scored, whole, group)


def full(tensor: Tensor) -> Tensor:
    """A tensor as it is on one process. All processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, or this process's part of it where `like` is divided."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)
