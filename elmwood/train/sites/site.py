"""One site of a DiLoCo run: its weights, those that all sites share, and the exchange in which the first become the second.

torchft's Manager says who takes part (a quorum of the sites that are there), sums over them, and brings a site that is behind to the state
of the others. A round that fails because a site died is repeated at once by those that are left: no steps of theirs are lost.

N numbers of a fragment
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import ReduceOp, TCPStore, Work
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from elmwood.errors import BadInput, Damaged, ElmwoodError
from elmwood.records import Diloco, Point
from elmwood.train import checkpoint
from elmwood.train.card.compiled import layers_of
from elmwood.train.loop import POINTS, adamw
from elmwood.train.sites.healing import Held, Transport
from elmwood.train.sites.lasting import Lasting

RETRIES = 10  # of a round that fails
SLOWEST = 1e6  # bits a second: an exchange over a slower link is given up
CHECKED = 1 << 24  # checksums that a float64 adds and squares exactly


class Alone(ElmwoodError):
    """Too few other sites can be reached."""


class Stand(NamedTuple):
    """Where the run is. All but the last field is equal at all sites."""

    round: int = 0
    tokens: int = 0  # applied, of all sites
    loss: float = 0.0  # sum over rounds since the last point of the curve, nats per token
    curve: tuple[Point, ...] = ()
    lost: int = 0  # tokens that this site trained, at most, and no round applied


class Said(NamedTuple):
    """What all sites of a quorum said before they exchanged weights, summed."""

    sites: int
    tokens: int
    loss: float  # times tokens
    alike: bool  # they have the same plan, and the same weights to start from


class Begun(NamedTuple):
    """An exchange under way."""

    said: Said
    names: list[str]
    sum_N: Tensor
    work: Work | None  # None: there is nothing to wait for

    @property
    def idle(self) -> bool:
        """No site has trained: they only met."""
        return self.said.sites > 0 and self.said.tokens == 0


class Site:
    """The state of a site. `whole`, `velocity` and `stand` are those of all sites, as of the last round."""

    def __init__(self, model: Any, plan: Diloco, folder: Path):
        self.plan, self.folder, self.stand, self.healed = plan, folder, Stand(), False
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        self.optimizer = adamw(self.weights, plan.recipe)
        self.fragments = divide(model, plan.fragments)
        self.whole = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in self.weights.items()}
        self.velocity = {name: torch.zeros_like(whole) for name, whole in self.whole.items()}
        self._read()

    # ---- its own checkpoint, after every round

    def save(self) -> None:
        """Write the state. The file that is written last names the other."""
        outer = {f"whole.{name}": whole for name, whole in self.whole.items()} | {
            f"velocity.{name}": v for name, v in self.velocity.items()
        }
        checkpoint.write_tensors(self.folder / self._outer, outer, {})
        plain = self.stand._asdict() | {"curve": [point.model_dump() for point in self.stand.curve]}
        plain["step"] = self.stand.round * self.plan.apart
        checkpoint.write(self.folder / checkpoint.FILE, plain, self.weights, self.optimizer)
        for path in self.folder.glob("outer-*.safetensors"):
            if path.name != self._outer:
                path.unlink()

    @property
    def _outer(self) -> str:
        return f"outer-{self.stand.round}.safetensors"

    def _read(self) -> None:
        """Raises Damaged."""
        found = checkpoint.read(self.folder / checkpoint.FILE, _parse, self.weights, self.optimizer)
        if found is None:
            return
        self.stand = found
        try:
            self._take(load_file(self.folder / self._outer))
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise Damaged(f"{self.folder / self._outer} cannot be read ({error}): delete its folder, and this site begins anew") from error

    def _take(self, tensors: dict[str, Tensor]) -> None:
        for kind, own in (("whole", self.whole), ("velocity", self.velocity)):
            for name, tensor in own.items():
                tensor.copy_(tensors[f"{kind}.{name}"])

    # ---- the state that others get who are behind

    def give(self) -> Held:
        tensors = {f"{kind}.{name}": one for kind, own in (("whole", self.whole), ("velocity", self.velocity)) for name, one in own.items()}
        return Held(tensors, self.stand._asdict() | {"curve": [point.model_dump() for point in self.stand.curve]})

    @torch.no_grad()
    def heal(self, held: Held) -> None:
        """Take the state of another site. What this one trained since its last round is lost."""
        self._take(held.tensors)
        self.stand, self.healed = _parse(held.plain)._replace(lost=self.stand.lost), True
        for name, weight in self.weights.items():
            weight.copy_(self.whole[name])

    # ---- exchanges

    def begin(self, manager: Manager, tokens: int, loss: float, wait: timedelta | None = None) -> Begun:
        """Meet the others, and begin to sum what this site trained. Raises BadInput, Damaged, Alone.

        A site that was behind is brought to the state of the others, and adds nothing (`healed`).
        """
        self.healed = False
        try:
            manager.start_quorum(timeout=wait)
        except (TimeoutError, RuntimeError) as error:
            raise Alone(
                f"no majority of {self.plan.sites} sites met in time ({error}): see that the lighthouse and the other sites run; this "
                "site resumes from its last round"
            ) from error
        if self.healed:
            self.stand = self.stand._replace(lost=self.stand.lost + tokens)
            tokens = 0
        names = self.fragments[self.stand.round % len(self.fragments)]
        said = self._ask(manager, names, tokens, loss)
        if said is None:
            return Begun(Said(0, 0, 0.0, True), names, torch.empty(0), None)
        if not said.alike:
            raise Damaged(
                "the sites differ in their plan or weights: give all of them the same seed, corpus and options; where they had "
                f"them, delete {self.folder} at the site that was restored from an older copy"
            )
        if said.sites > self.plan.sites:
            raise BadInput(f"{said.sites} sites are here, and the plan says --sites {self.plan.sites}: start each --site once")
        if not math.isfinite(said.loss):
            raise BadInput(
                f"a site's loss became {said.loss}: --learning-rate {self.plan.recipe.learning_rate:g} is too high, try a third of it"
            )
        if not said.tokens:
            return Begun(said, names, torch.empty(0), None)
        parts = (self.whole[name] - self.weights[name].detach().to("cpu", torch.float32) for name in names)
        sum_N = torch.cat([part.flatten() for part in parts]) * (tokens / said.tokens)
        return Begun(said, names, sum_N, manager.allreduce(sum_N, reduce_op=ReduceOp.SUM))

    def _ask(self, manager: Manager, names: Iterable[str], tokens: int, loss: float) -> Said | None:
        """What all say; None where that failed."""
        check = zlib.crc32(self.plan.digest.encode())
        for name in names:
            check = zlib.crc32(self.whole[name].numpy().data, check)
        check %= CHECKED
        said = torch.tensor([1, tokens, tokens * loss, check, check**2], dtype=torch.float64)
        manager.allreduce(said, reduce_op=ReduceOp.SUM).wait()
        if manager.errored():
            return None
        sites, whole, losses, checks, squares = said.tolist()
        return Said(int(sites), int(whole), losses, sites * squares == checks**2)

    @torch.no_grad()
    def end(self, manager: Manager, begun: Begun) -> bool:
        """Wait for the sum, and take the outer step. False where a site failed. Raises Alone."""
        if begun.work is not None:
            begun.work.wait()
        try:
            if not manager.should_commit():
                return False
        except RuntimeError as error:
            raise Alone(f"{error}: look at the links between the sites; this one resumes from its last round") from error
        plan, stand = self.plan, self.stand
        mean = begun.sum_N.split([self.whole[name].numel() for name in begun.names])
        for name, delta_N in zip(begun.names, mean, strict=True):
            take_outer_step(plan, self.whole[name], self.velocity[name], delta_N.view_as(self.whole[name]))
            go_on_from(plan, self.whole[name], self.weights[name])
        done, loss = stand.round + 1, stand.loss + begun.said.loss / begun.said.tokens
        self.stand = stand._replace(round=done, tokens=stand.tokens + begun.said.tokens, loss=loss)
        if done % max(1, plan.rounds // POINTS) == 0 or done == plan.rounds:
            mean_loss = loss / (done - (stand.curve[-1].step // plan.apart if stand.curve else 0))
            point = Point(step=done * plan.apart, tokens=self.stand.tokens, loss=mean_loss)
            self.stand = self.stand._replace(loss=0.0, curve=(*stand.curve, point))
        self.save()
        return True


def take_outer_step(plan: Diloco, whole: Tensor, velocity: Tensor, delta: Tensor) -> None:
    """v = momentum v + d; whole - rate (d + momentum v), in place. `delta`: `whole` less the mean of the sites' weights."""
    velocity.mul_(plan.momentum).add_(delta)
    whole.sub_(delta + plan.momentum * velocity, alpha=plan.rate)


def go_on_from(plan: Diloco, whole: Tensor, weight: Tensor) -> None:
    """Set a site's own weight to what all share, and to `keep` of what it was, in place."""
    weight.copy_(torch.lerp(whole.to(weight.device), weight.float(), plan.keep) if plan.keep else whole)


def _parse(plain: dict[str, Any]) -> Stand:
    return Stand(**{field: plain[field] for field in Stand._fields} | {"curve": checkpoint.parse_curve(plain["curve"])})


def divide(model: Any, fragments: int) -> list[list[str]]:
    """The names of a model's weights in fragments: every `fragments`-th layer, as arXiv:2501.18512 does, and what is in no layer with the
    smallest of them. Raises BadInput."""
    layers = layers_of(model)
    if fragments > max(1, len(layers)):
        raise BadInput(f"--fragments {fragments}: the seed has {len(layers)} layers; choose at most so many")
    place = {id(weight): number % fragments for number, layer in enumerate(layers) for weight in layer.parameters()}
    found: list[list[str]] = [[] for _ in range(fragments)]
    sizes, others = [0] * fragments, list[str]()
    for name, weight in model.named_parameters():
        if id(weight) not in place:
            others.append(name)
            continue
        found[place[id(weight)]].append(name)
        sizes[place[id(weight)]] += weight.numel()
    found[sizes.index(min(sizes))] += others
    return found


@contextmanager
def open_manager(site: Site, number: int, lighthouse: str, address: str, wait_s: float) -> Iterator[tuple[Manager, Callable[[], None]]]:
    """A Manager of torchft for a site, and a function that closes its connections to the others until the next quorum. A majority of the
    sites makes a quorum."""
    size = 4 * max(sum(site.whole[name].numel() for name in names) for names in site.fragments)
    limit = timedelta(seconds=60 + 2 * 8 * size / SLOWEST)
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    group, transport = ProcessGroupGloo(timeout=limit), Transport(address, site.folder)
    try:
        manager = Manager(
            group, None, None, min_replica_size=site.plan.sites // 2 + 1, use_async_quorum=False, timeout=limit,
            quorum_timeout=timedelta(seconds=wait_s), rank=0, world_size=1, store_addr=address, store_port=store.port,
            lighthouse_addr=lighthouse, replica_id=f"site{number}", hostname=address, checkpoint_transport=transport, init_sync=False,
            max_retries=RETRIES,
        )  # fmt: skip
    except (TimeoutError, RuntimeError) as error:
        transport.shutdown()
        raise Alone(f"no lighthouse answers at {lighthouse} ({error}): start torchft_lighthouse there, and look at the VPN") from error
    manager._client = Lasting(manager._client, lighthouse)
    manager.register_state_dict_fn("site", site.heal, site.give)
    manager.load_state_dict({"step": site.stand.round, "batches_committed": 0})
    try:
        yield manager, group.shutdown
    finally:
        manager.shutdown()
        group.shutdown()
