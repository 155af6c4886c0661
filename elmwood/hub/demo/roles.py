"""The processes of the community in a box. Each has a store of its own and knows the others by the hub's address alone."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from elmwood.hub.client.gate import WEIGHTS
from elmwood.hub.client.http import Hub
from elmwood.hub.client.join import Fetched, Train, join, train_grant
from elmwood.hub.client.judge import judge
from elmwood.hub.client.state import Options, Told, once
from elmwood.hub.client.transfer import fetch_blob, fetch_record
from elmwood.hub.client.verify import verify_work
from elmwood.hub.messages import Grant, Measurement, Signed, Snapshot
from elmwood.hub.signing import load_key
from elmwood.records import Digest, Ensemble, Expert, Recipe
from elmwood.store import Store
from elmwood.store.disk import write_whole

LOOK = 1.0  # seconds between two questions, at most: nobody here has to wait for a minute


class Volunteer(NamedTuple):
    """Somebody who joins."""

    name: str
    lies: str = ""  # a row of LIES
    slow: float = 0.0  # how slow the machine is: so many times the setting's lag


def quietly(work: Callable[..., Any], log: Path, *given: Any) -> None:
    """Run in a process of its own whose output goes to a file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with suppress(KeyboardInterrupt):
        work(*given)


def wait(seconds: float) -> None:
    time.sleep(min(seconds, LOOK))


# ---- the hub's side ---------------------------------------------------------------------------------------------------


def serve_hub(run: str, store: Path, port: int) -> None:
    """The hub."""
    from elmwood.hub.care import serve
    from elmwood.hub.home import Home
    from elmwood.hub.home import Hub as Opened

    hub = Opened(Home(run, Store(store)))
    try:
        serve(hub, "127.0.0.1", port)
    finally:
        hub.close()


def verify(url: str, store: Path, key: Path) -> None:
    """A verifier that the maintainer trusts. It judges here, and not in a process for each case, whose start takes longer than judging."""
    verify_work(url, Store(store), key=key, run=lambda case, *_: judge(case), sleep=wait)


class Control(NamedTuple):
    """The dense model that the ensemble is compared with: what trains it, and on which text."""

    seed: Digest
    corpus: Digest
    recipe: Recipe


def compare(url: str, store: Path, key: Path, control: Control) -> None:
    """Train the control, then measure every snapshot beside it, as they come."""
    from elmwood.records import Corpus, Seed
    from elmwood.study.quality.snapshots import measure
    from elmwood.train.tasks import train

    home, hub = Store(store), Hub(url, load_key(key))
    seed, corpus = home.load(control.seed, Seed), home.load(control.corpus, Corpus)
    dense = train(seed, corpus.train, control.recipe, home)
    done = 0
    while True:
        newest = Snapshot.model_validate(Signed.model_validate_json(hub.get("/v1/snapshot").body).body)
        for version in range(done + 1, newest.version + 1):
            made = Snapshot.model_validate(Signed.model_validate_json(hub.get(f"/v1/snapshot?version={version}").body).body)
            ensemble = home.load(made.ensemble, Ensemble) if made.experts and bring(made, hub, home) else None
            if ensemble and not ensemble.bounded:
                found = measure([ensemble], home, control=dense)
                (one,), control_loss = found.ensembles, found.control
                assert control_loss
                assert one.over_control
                body = Measurement(
                    version=version, bits_per_byte=one.loss.value, standard_error=one.loss.standard_error,
                    seed_bits_per_byte=found.seed.value, seed_error=found.seed.standard_error, documents=found.documents,
                    over_seed=one.over_seed.value, over_seed_error=one.over_seed.standard_error, control_bits_per_byte=control_loss.value,
                    control_error=control_loss.standard_error, gain=one.over_control.value, gain_error=one.over_control.standard_error,
                )  # fmt: skip
                hub.post("/v1/measurements", body, once("measure", version))
        done = newest.version
        wait(LOOK)


def bring(made: Snapshot, hub: Hub, store: Store) -> bool:
    """A snapshot's records and the files of its experts."""
    for member in made.experts:
        expert = fetch_record(member.expert, hub, store)
        assert isinstance(expert, Expert)
        for blob in expert.files.values():
            fetch_blob(blob, hub, store)
    for digest in (made.forest, made.ensemble):
        fetch_record(digest, hub, store)
    return True


# ---- the volunteers ---------------------------------------------------------------------------------------------------


def volunteer(url: str, store: Path, who: Volunteer, step_pause: float) -> None:
    """Join, train one domain and hear the verdict. The step is written beside the store, for whoever watches."""
    mark = step_file(store)

    def tell(told: Told) -> None:
        if told.phase == "training":
            write_whole(mark, f"{told.step}".encode())

    options = Options(name=who.name, agree=lambda texts: True, once=True, step_pause=step_pause)
    train: Train | None = LIES[who.lies](url) if who.lies else None
    join(url, Store(store), options=options, train=train, tell=tell, sleep=wait)


def step_file(store: Path) -> Path:
    """Where a volunteer writes its step."""
    return store.with_suffix(".step")


def copy_in_another_basis(url: str) -> Train:
    """Trains nothing: takes the first expert that was accepted, its factors in another basis. The product B A is the same."""

    def train(grant: Grant, fetched: Fetched, folder: Path, on_step: Callable[[int], None]) -> Path:
        hub, store = Hub(url), fetched.store
        while not (known := hub.get("/v1/experts").json()):
            on_step(0)
            time.sleep(LOOK)
        expert = fetch_record(known[0]["digest"], hub, store)
        assert isinstance(expert, Expert)
        tensors = load_file(fetch_blob(expert.files[WEIGHTS], hub, store))
        return rewrite(tensors, folder / "copy.safetensors", turn(np.random.default_rng(grant.token)))

    return train


def turn(rng: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """B A = (B Q') (Q A) for an orthogonal Q."""

    def changed(a_RI: np.ndarray, b_OR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q_RR = np.linalg.qr(rng.normal(size=(len(a_RI), len(a_RI))))[0]
        return q_RR @ a_RI, b_OR @ q_RR.T

    return changed


def train_against(url: str) -> Train:
    """Half of the training, and its delta with the sign changed: on text of the domain the model becomes worse than the seed."""

    def train(grant: Grant, fetched: Fetched, folder: Path, on_step: Callable[[int], None]) -> Path:
        recipe = grant.recipe.model_copy(update={"steps": max(1, grant.recipe.steps // 2)})
        path = train_grant(grant.model_copy(update={"recipe": recipe}), fetched, folder, on_step)
        return rewrite(load_file(path), folder / "against.safetensors", lambda a_RI, b_OR: (a_RI, -b_OR))

    return train


def rewrite(
    tensors: dict[str, np.ndarray], path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> Path:  # fmt: skip
    """An adapter with its pairs of factors changed."""
    changed = dict(tensors)
    for name in tensors:
        if "lora_A" in name:
            pair = name, name.replace("lora_A", "lora_B")
            made = change(*(tensors[one].astype(np.float64) for one in pair))
            changed |= {one: np.ascontiguousarray(value, np.float32) for one, value in zip(pair, made, strict=True)}
    save_file(changed, path, metadata={"format": "pt"})
    return path


LIES: dict[str, Callable[[str], Train]] = {"copy": copy_in_another_basis, "against": train_against}
