"""The draft of a run from a store: a recipe for each tier of machines from `fit`, domains with or without their text, licences."""

from collections.abc import Sequence
from pathlib import Path

from elmwood.errors import BadInput
from elmwood.hub.client.gate import adapter_config, expected_tensors
from elmwood.hub.home import Home, Hub
from elmwood.hub.manifest import publish
from elmwood.hub.messages import Gate, Licences, Limits, RunDomain, RunManifest, Signed, Terms, Tier, TierName
from elmwood.records import Ensemble, Forest, Partition, Recipe, Seed
from elmwood.store import Named, Store
from elmwood.study.training import plan_training

CARDS: tuple[TierName, ...] = ("4", "8", "12", "24")  # GB
FREE = 0.1  # share of a card that is left free
UNSET = "0" * 64
LICENCES = {
    "data": "The training text of this run has the licences of its sources; the maintainer names them beside the run.\n",
    "contribution": "You give the adapters that you submit under the Apache License 2.0, and can take them back: they are then retired.\n",
    "disk": "The seed, the text of leased domains and your adapters stay in the store on your disk until you delete them.\n",
}


def draft_run(
    run: str, seed: Named, partition: Named, store: Store, *, tokens: int | str = "1M", rank: int = 16, batch: int = 8,
    length: int | None = None, learning_rate: float | None = None, method: str = "lora", cards: bool = True, with_text: bool = True,
    licences: dict[str, Path] | None = None, days: float = 30.0, terms: Terms | None = None, gate: Gate | None = None,
    limits: Limits | None = None, ensemble: Ensemble | None = None, minimum_client: str = "0",
) -> RunManifest:  # fmt: skip
    """What `publish` signs. `cards`: recipes for GPUs too; `with_text`: volunteers get the training shards, else they bring text of their
    own; `licences`: files of the texts `data`, `contribution` and `disk`. Needs torch. Raises BadInput, UnknownName."""
    plan = plan_training(
        partition, seed, method=method, tokens=tokens, rank=rank, batch=batch, length=length, learning_rate=learning_rate, store=store
    )
    division, start = store.load(plan.partition, Partition), store.load(plan.seed, Seed)
    if start.hub:
        raise BadInput(f"the weights of the seed are in the cache of a model hub ({start.hub}): import them into the store")
    recipes = {"cpu": plan.recipe} | (recipes_of_cards(start, plan.recipe, store) if cards else {})
    forest = Forest(seed=start.digest, partition=division.digest, experts=())
    store.add(forest)
    chosen = ensemble or Ensemble(forest=forest.digest, router="centroid", top_k=2, temperature=0.1, seed_distance=0.8)
    texts = {name: (licences or {}).get(name) for name in LICENCES}
    words = {name: path.read_bytes() if path else LICENCES[name].encode() for name, path in texts.items()}
    return RunManifest(
        run=run, version=1, issued=0, expires_s=days * 86400, seed=start.digest, partition=division.digest,
        ensemble=chosen.model_copy(update={"forest": forest.digest}), domains=_domains(division, start, with_text),
        tiers={name: make_tier(start, recipe, store) for name, recipe in recipes.items()}, gate=gate or Gate(),
        licences=Licences(**{name: store.put(text) for name, text in words.items()}), limits=limits or Limits(), terms=terms or Terms(),
        minimum_client=minimum_client, hub_key=UNSET, root_key=UNSET,
    )  # fmt: skip


def _domains(division: Partition, seed: Seed, with_text: bool) -> tuple[RunDomain, ...]:
    return tuple(
        RunDomain(number=number, name=one.name[:200], terms=tuple(term[:200] for term in one.terms[:20] if term),
                  shards=one.train if with_text else (), tokens=one.bytes // 4)  # about four bytes each
        for number, one in enumerate(division.domains)
    )  # fmt: skip


def recipes_of_cards(seed: Seed, base: Recipe, store: Store) -> dict[TierName, Recipe]:
    """For each size of card the recipe nearest to this one that leaves a tenth of it free; cards without any are left out."""
    from elmwood.train.fit.formulas import anatomy, components
    from elmwood.train.fit.predict import load_config

    body = anatomy(load_config(seed, store))
    saving = {"accumulate": base.batch, "checkpointing": True}
    tried = [base, base.model_copy(update=saving), base.model_copy(update=saving | {"method": "qlora", "optimiser": "adamw8bit"})]
    found: dict[TierName, Recipe] = {}
    for card in CARDS:
        fits = (one for one in tried if sum(components(body, one, "cuda").values()) <= (1 - FREE) * int(card) * 1e9)
        if recipe := next(fits, None):
            found[card] = recipe
    return found


def make_tier(seed: Seed, recipe: Recipe, store: Store) -> Tier:
    """A tier: its tensors, and the adapter_config.json that the hub puts beside them. Needs torch."""
    tensors = expected_tensors(seed, recipe, store)
    size = sum(4 * _count(shape) for shape in tensors.values())
    return Tier(recipe=recipe, tensors=tensors, config=store.put(adapter_config(recipe, seed, tensors)), bytes=size + (1 << 20))


def _count(shape: Sequence[int]) -> int:
    found = 1
    for side in shape:
        found *= side
    return found


def publish_run(draft: RunManifest, store: Store, database: str | None = None, blobs: str | None = None) -> Signed:
    """Publish a draft, in a new hub or as the next version of the one that is there; with the map for its pages."""
    from elmwood.hub.pages import atlas

    home = Home(draft.run, store)
    home.make_keys()
    home.keep_settings(database, blobs)
    hub = Hub(home)
    try:
        return publish(draft, hub, atlas=atlas.make(store.load(draft.partition, Partition), store).model_dump_json())
    finally:
        hub.close()
