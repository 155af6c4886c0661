"""The task of a site: inner steps on its rows, an exchange after each round, and at the end the same seed as at all other sites."""

import fcntl
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torchft.manager import Manager

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.lm.files import tokenizer
from elmwood.lm.load import load_model, save_seed
from elmwood.records import Corpus, Diloco, Seed, fingerprint
from elmwood.store import Store
from elmwood.train.card.path import fast_path
from elmwood.train.data import split_batch
from elmwood.train.loop import add_gradients, recompute_activations, update_weights, use_threads
from elmwood.train.seeds.stream import Source, Stream
from elmwood.train.sites.site import Alone, Begun, Site, open_manager
from elmwood.train.tasks import check_length

LAST = timedelta(seconds=60)  # that a finished site waits for others who may be behind
SIOCGIFADDR = 0x8915  # ask the kernel for the address of an interface (Linux)
OnStep = Callable[[int, int], None]  # round, steps of it done


def train_at_site(
    plan: Diloco, number: int, lighthouse: str, store: Store, *, name: str = "seed", wait_s: float = 3600.0,
    device: torch.device | str | None = None, on_step: OnStep = lambda round, step: None, progress: Progress = silent,
) -> Seed:  # fmt: skip
    """Train a seed as one of several sites; all of them end with the same record. Interrupted sites resume from their last round.

    `lighthouse`: the address of torchft's coordinator. `wait_s`: the longest that a site waits for others. Raises BadInput, BadCorpus,
    Damaged, MissingExtra, Alone.
    """
    if not 0 <= number < plan.sites:
        raise BadInput(f"--site {number}: the sites are 0 to {plan.sites - 1}")
    seed, corpus = store.load(plan.seed, Seed), store.load(plan.corpus, Corpus)
    check_length(plan.recipe, seed.context)
    key = fingerprint("diloco", plan, name, number)
    with store.held(key, progress) as work:
        if done := store.done(key):
            return store.load(done, Seed)
        store.add(plan)
        address = find_address(lighthouse)
        words = tokenizer(seed, store)
        model: Any = load_model(seed, store, device=device, dtype=torch.float32)
        stream = Stream([Source(corpus)], words, seed.separator, plan.recipe, store, progress)
        began = time.monotonic()
        site = _run(model, plan, number, lighthouse, address, work, stream, wait_s, on_step, progress)
        with torch.no_grad():
            for one, weight in site.weights.items():
                weight.copy_(site.whole[one])
        made = save_seed(
            model, words, store, name=name, separator=seed.separator, corpus=plan.corpus, plan=plan.digest, recipe=plan.recipe,
            curve=site.stand.curve, limits=seed.limits, licence=seed.licence,
        )  # fmt: skip
        skipped = plan.rounds * plan.sites * plan.tokens - site.stand.tokens
        store.log(
            key, event="done", seconds=round(time.monotonic() - began, 3), tokens=site.stand.tokens, skipped=skipped, lost=site.stand.lost
        )
        store.finish(key, made)
        return made


def _run(
    model: Any, plan: Diloco, number: int, lighthouse: str, address: str, work: Path, stream: Stream, wait_s: float, on_step: OnStep,
    progress: Progress,
) -> Site:  # fmt: skip
    """All rounds."""
    own = plan.recipe.model_copy(update={"batch": plan.recipe.batch // plan.sites})
    site = Site(model, plan, work)
    with ExitStack() as around:
        manager, hang_up = around.enter_context(open_manager(site, number, lighthouse, address, wait_s))
        around.enter_context(use_threads(own.threads))
        around.enter_context(torch.random.fork_rng())
        around.enter_context(recompute_activations(model, own))
        able = around.enter_context(fast_path(model, own))
        meet(site, manager, hang_up, progress)
        rows, due = stream(0), 0
        while site.stand.round < plan.rounds:
            model.train()
            round, first = site.stand.round, site.stand.round * plan.apart
            if first != due:  # resumed, or brought to the round of the others
                rows = stream(first)
            exchange, losses = Exchange(site, manager, plan.tokens, hang_up), list[Tensor]()
            for step in range(plan.apart):
                if step == plan.apart - plan.delay:
                    exchange.begin(losses)
                torch.manual_seed((plan.recipe.rng_seed << 32) + (first + step) * plan.sites + number)
                batch = next(islice(split_batch(next(rows), plan.sites), number, None))
                losses.append(add_gradients(model, able, batch, own))
                update_weights(site.optimizer, plan.recipe, first + step)
                on_step(round, step + 1)
                progress(f"train at {plan.sites} sites", (first + step + 1) * plan.recipe.batch * own.length, plan.recipe.tokens, "tokens")
            due = first + plan.apart
            exchange.end(losses)
        model.eval()
        with suppress(Alone):  # those that are behind by a round, if there are such
            site.begin(manager, 0, 0.0, LAST)
    return site


class Exchange:
    """The exchange of one round, which is begun again where a site died in it."""

    def __init__(self, site: Site, manager: Manager, tokens: int, hang_up: Callable[[], None]):
        self.site, self.manager, self.tokens, self.hang_up = site, manager, tokens, hang_up
        self.begun: Begun | None = None

    def begin(self, losses: Sequence[Tensor]) -> None:
        mean = torch.stack(list(losses)).mean().item() if losses else 0.0
        self.begun = self.site.begin(self.manager, self.tokens, mean)
        if self.site.healed:
            self.tokens = 0

    def end(self, losses: Sequence[Tensor]) -> None:
        """Until the round is done; or nobody has anything to exchange, and it is trained again."""
        if self.begun is None:
            self.begin(losses)
        while not self._over():
            self.hang_up()  # gloo's sums go round a ring: who waits for one that waits for a dead one would wait for long
            self.begin(losses)

    def _over(self) -> bool:
        begun, self.begun = self.begun, None
        return begun is None or begun.idle or self.site.end(self.manager, begun)


def meet(site: Site, manager: Manager, hang_up: Callable[[], None], progress: Progress) -> None:
    """Wait for the others: for all of them at the start of a run, since then no site can have weights that it would undo; later until the
    next exchange of those who are at work."""
    while True:
        begun = site.begin(manager, 0, 0.0)
        if begun.idle:
            if site.stand.round or begun.said.sites == site.plan.sites:
                return
            progress(f"wait for all sites: {begun.said.sites} of {site.plan.sites} are here", 0, 0, "")
        elif site.end(manager, begun):
            return
        else:
            del begun
            hang_up()


# ---- addresses ---------------------------------------------------------------------------------------------------


def find_address(lighthouse: str) -> str:
    """The address of this machine in the network of the lighthouse; gloo is told to use it. Raises BadInput.

    Whoever reaches the ports of a site can stop the run or change what it computes: public addresses are refused.
    """
    place = urlsplit(lighthouse)
    if place.scheme != "http" or not place.hostname or not place.port:
        raise BadInput(f"--lighthouse {lighthouse}: write http://HOST:PORT, as torchft_lighthouse prints it")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect((place.hostname, place.port))  # chooses a route; nothing is sent
        except OSError as error:
            raise BadInput(f"--lighthouse {lighthouse}: no way there ({error}): is the VPN up?") from error
        own, there = asked.getsockname()[0], asked.getpeername()[0]
    for one in (own, there):
        if not ipaddress.ip_address(one).is_private:
            raise BadInput(
                f"--lighthouse {lighthouse}: {one} is a public address, and torchft has no passwords: join the sites by a VPN, such "
                "as WireGuard, and name the lighthouse's address in it"
            )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(own))
    return own


def _interface(address: str) -> str:
    """The network interface that has this address (Linux)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                found = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    raise BadInput(f"no network interface has the address {address}: set GLOO_SOCKET_IFNAME to its name")
