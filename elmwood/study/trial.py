"""A seed tried at the door: what it can be used for is known, with the reason, before anything is trained on it.

A small seed is tried itself, a larger one as a copy of its config with fewer and smaller layers and random weights. Each use is run by
the code that serves it later, and held against transformers or PEFT. What cannot be tried is not limited.
"""

import copy
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elmwood.errors import BadInput, BadSeed, DoesNotFit, ElmwoodError, MissingExtra
from elmwood.lm.adapters.peft_config import read_settings
from elmwood.lm.files import seed_folder, tokenizer
from elmwood.records import Expert, Recipe, Seed
from elmwood.records.models import Use
from elmwood.registry import require
from elmwood.store import Store

if TYPE_CHECKING:
    from torch import Tensor

OWN = 5_000_000  # parameters up to which a seed is tried itself
MOST = 40_000_000  # of a copy: one that stays larger is not tried
ROWS, TOKENS, VOCABULARY, RANK = 2, 24, 512, 2
EQUAL, ROUNDED = 1e-3, 0.3  # largest difference of a log-probability; where what is folded is rounded to half precision
IN_BANK = "an adapter gives other probabilities here than in PEFT"
LONGEST = 300  # characters of a reason
WORDS: dict[Use, str] = {
    "generate": "continue text (chat)", "lora": "train adapters (--method lora, qlora, dora)",
    "full": "train full experts (--method full)", "merge": "make checkpoints of experts (merge, fold)",
}  # fmt: skip


class Copy(NamedTuple):
    """What is tried: a seed in a store of its own."""

    seed: Seed
    store: Store
    folder: Path  # for scratch files
    tokens_BT: "Tensor"
    equal: float


class Differs(Exception):
    """Two ways to the same number gave two numbers."""


def check_use(seed: Seed, use: Use) -> None:
    """Raises BadSeed where the seed's record says that it cannot serve this use. A record may come from a stranger: it only refuses."""
    if use in seed.limits:
        raise BadSeed(f"{seed.name} cannot {WORDS[use]}: {seed.limits[use]}")


def say_limits(seed: Seed) -> list[str]:
    """What the seed's record says that it cannot do, and why."""
    return [f"cannot {WORDS[use]}: {reason}" for use, reason in seed.limits.items()]


def try_seed(seed: Seed, store: Store) -> dict[Use, str]:
    """Use -> why the seed cannot serve it; empty where it serves all."""
    limits: dict[Use, str] = {}
    with _scratch() as folder:

        def attempt(use: Use, step: Callable[[], Any]) -> Any:
            try:
                return step()
            except Exception as error:  # whatever is raised here would be raised in the middle of the user's work
                if isinstance(error, MemoryError | DoesNotFit) or getattr(error, "errno", None):
                    raise  # of this machine, not of the seed
                limits[use] = _reason(error, folder)

        if (at := _copy(seed, store, folder)) is None:
            return limits
        lora = attempt("lora", lambda: _adapter(at))
        full = attempt("full", lambda: _checkpoint(at))
        attempt("generate", lambda: _grow(at, [one for one in (lora, full) if one]))
        attempt("merge", lambda: _combine(at, lora, full))
    return limits


def try_adapter(expert: Expert, seed: Seed, store: Store) -> None:
    """Raises BadInput where an adapter made elsewhere would score otherwise in PEFT than here, or folded. Over a small copy of the seed
    its settings are tried, with random weights."""
    with _scratch() as folder:
        if (at := _copy(seed, store, folder)) is None:
            return
        files = _like(expert, at, store) if seed.parameters > OWN else at.store.put_folder(store.folder(expert.files))
        if not files:
            return
        mine = expert.model_copy(update={"seed": at.seed.digest, "partition": None, "domain": None, "files": files})
        at.store.add(mine)
        try:
            _, live_BT = _fold(at, mine)
            _compare(_score(at, mine), live_BT, EQUAL, IN_BANK)
        except Differs as error:
            raise BadInput(f"adapter {expert.digest[:8]} on {seed.name}: {error}; train it with plain LoRA on linear layers") from error


def why_no_gguf(seed: Seed, store: Store) -> str:
    """Why the exporter does not take this architecture; empty where it does, or the extra is absent. Not a limit in the record, since
    the exporter learns architectures."""
    try:
        require("gguf", "gguf")
        from elmwood.merge.export.gguf_config import read_config

        read_config(seed_folder(seed, store))
    except MissingExtra:
        return ""
    except BadInput as error:
        return str(error)
    return ""


def _reason(error: Exception, folder: Path) -> str:
    """What an error says, without what differs from one trial to the next: places of scratch files, digests of the experts tried."""
    said = " ".join(str(error).split())  # errors of ours end in the cure
    said = re.sub(r"(expert|merged) [0-9a-f]{8}", r"an \1", re.sub(rf"{re.escape(str(folder))}\S*", "a file", said))
    if isinstance(error, Differs):
        return f"{said}; use another seed"
    if not isinstance(error, ElmwoodError):
        return f"transformers or PEFT fail there with {type(error).__name__}: {said[:LONGEST]}; use another seed"
    return said[:LONGEST]


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder, the random numbers of torch left as they were, and no warnings: this is not what the user asked for."""
    import torch
    from transformers.utils import logging

    said = logging.get_verbosity()
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        torch.manual_seed(0)
        try:
            yield Path(scratch)
        finally:
            logging.set_verbosity(said)


# ---- what is tried ----------------------------------------------------------------------------------------------


def _copy(seed: Seed, store: Store, folder: Path) -> Copy | None:
    """None where it would take long."""
    import torch

    from elmwood.lm.pretrained import open_config

    home, source = Store(folder / "store"), seed_folder(seed, store)
    config = open_config(source)
    if seed.parameters <= OWN:
        files = home.put_folder(source)
        exact = str(getattr(config, "dtype", None)) in ("torch.float32", "None")
    else:
        if not _write_copy(config, folder / "copy"):
            return None
        files, exact = home.put_folder(folder / "copy"), True
        files["tokenizer.json"] = home.put(source / "tokenizer.json")
        config = open_config(folder / "copy")
    rows = config.get_text_config().vocab_size
    small = seed.model_copy(update={"files": files, "hub": None, "vocabulary": rows, "separator": 0})
    home.add(small)
    tokens_BT = torch.randint(rows, (ROWS, min(TOKENS, seed.context)))
    return Copy(small, home, folder, tokens_BT, EQUAL if exact else ROUNDED)


def _write_copy(config: Any, folder: Path) -> bool:
    """A checkpoint of a small copy of a config, with random weights; False where none can be made."""
    import torch

    from elmwood.lm.pretrained import empty_model, make_config, new_model_of

    try:
        small = make_config(shrunk(config.to_dict()))
        if empty_model(small).num_parameters() > MOST:
            return False
        model = new_model_of(small, torch.float32)
    except ElmwoodError:  # an architecture whose sizes depend on one another in another way than `shrunk` knows
        return False
    with torch.no_grad():  # louder: fresh models say nearly nothing
        for weight in model.parameters():
            weight.mul_(3.0) if weight.dim() > 1 else weight.add_(torch.randn_like(weight) / 8)
    model.save_pretrained(folder)
    return True


_WIDTH = re.compile(r"hidden_size|intermediate_size|n_embd|d_model|d_ff|dff|ffn_dim|n_inner|embed_proj_dim|lru_width|d_ssm|(?<!d_)heads?$")
_COUNT = re.compile(r"num_(local_)?experts$|n_routed_experts|n_shared_experts|num_experts_per_tok|n_group|topk_group")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _share(numbers: Mapping[str, int]) -> int:
    """By how much to divide: two heads are left, where their number is even; without heads a width of about 64."""
    width = next((numbers[key] for key in ("hidden_size", "n_embd", "d_model") if key in numbers), 1)
    named = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    heads = next((numbers[key] for key in named if key in numbers), 0)
    if not heads:
        return math.gcd(width, max(1, width // 64))
    return math.gcd(width, heads if heads % 2 else heads // 2)


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with fewer layers, heads, experts and tokens; what is left keeps its size, as do the heads: positions depend on it.

    Of layers of several kinds so many stay that each kind occurs.
    """
    made = {key: copy.deepcopy(value) for key, value in config.items() if key != "dtype"}
    numbers = {key: value for key, value in made.items() if type(value) is int}
    share = _share(numbers)
    for key, value in numbers.items():
        if "key_value" in key or key.endswith("heads_kv") or "kv_heads" in key:
            made[key] = value // share if value % share == 0 else 1
        elif _WIDTH.search(key) and "layers" not in key:
            made[key] = max(1, value // share)
        elif _COUNT.search(key):
            made[key] = min(value, 1 if "group" in key else 2 if "per_tok" in key else 4)
        elif key.endswith("_token_id") and value >= VOCABULARY:
            made[key] = 0
        elif key == "vocab_size":
            made[key] = min(value, VOCABULARY)
    depth = next((numbers[key] for key in _LAYERS if key in numbers), 0)
    lists = {key: value for key, value in made.items() if isinstance(value, list) and len(value) == depth}
    periods = [value for key, value in numbers.items() if re.search(r"period|interval|pattern|step$|frequency", key)]
    kinds = [max(value.index(kind) for kind in value) + 1 for value in lists.values()]
    kept = min(depth, max([2, *kinds, *periods]), 12)
    return made | {key: kept for key in _LAYERS if key in numbers} | {key: value[:kept] for key, value in lists.items()}


# ---- the uses ---------------------------------------------------------------------------------------------------


def _adapter(at: Copy) -> Expert:
    """An adapter at the default places: trained a step, stored, scored by the bank, and by PEFT."""
    from elmwood.train.tasks import open_trainable

    recipe = Recipe(method="lora", steps=1, rank=RANK)
    model = open_trainable(at.seed, recipe, at.store, "cpu")
    _backward(model, at)
    _shake(model)
    return _expert(at, model, recipe, IN_BANK)


def _checkpoint(at: Copy) -> Expert:
    """A full expert: trained a step, stored, loaded again."""
    import torch

    from elmwood.train.tasks import open_trainable

    recipe = Recipe(method="full", steps=1)
    model = open_trainable(at.seed, recipe, at.store, "cpu")
    _backward(model, at)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (weight.std(correction=0) / 8))
    return _expert(at, model, recipe, "a saved checkpoint gives other probabilities than the model that was saved")


def _backward(model: Any, at: Copy) -> None:
    from elmwood.train.loss import find_abilities, loss

    loss(model, find_abilities(model), at.tokens_BT[:, :-1], at.tokens_BT[:, 1:], None).backward()


def _expert(at: Copy, model: Any, recipe: Recipe, differs: str) -> Expert:
    """The record of a model, which must score as the model does."""
    from elmwood.train.tasks import store_trained

    live_BT = _logp(model, at)
    files = store_trained(model, tokenizer(at.seed, at.store), recipe, at.store)
    expert = Expert(seed=at.seed.digest, data=(), recipe=recipe, files=files)
    at.store.add(expert)
    _compare(_score(at, expert), live_BT, EQUAL, differs)
    return expert


def _score(at: Copy, expert: Expert) -> "Tensor":
    """log p of each token but the first [B, T - 1], by the code that scores experts."""
    from elmwood.lm.experts import Experts

    return Experts(at.seed, [expert], at.store, "cpu").score(0, at.tokens_BT)[:, 1:]


def _grow(at: Copy, experts: list[Expert]) -> None:
    """Text that grows by a few tokens at a time has the probabilities of text that is read at once."""
    from elmwood.lm.experts import Experts

    held = Experts(at.seed, experts, at.store, "cpu")
    text, row_T = held.start(), at.tokens_BT[0]
    ends = sorted({1, 5, 6, len(row_T) - 2, len(row_T) - 1})
    for first, last in zip([0, *ends], ends, strict=False):
        logp_AV, _ = held.extend(range(len(held)), row_T[first:last].tolist(), text)
        for e in range(len(held)):
            at_once = held.score(e, at.tokens_BT[:1, : last + 1])[0, -1]
            _compare(logp_AV[e, row_T[last]], at_once, EQUAL, "text that grows gets other probabilities than text that is read at once")


def _fold(at: Copy, lora: Expert) -> tuple[Any, "Tensor"]:
    """The seed with the adapter folded into it, which must score as PEFT does; and what that is."""
    from elmwood.lm.load import load_model
    from elmwood.merge.export.folder import export

    ours = at.folder / "folded"
    export(lora, at.store, ours, "transformers")
    folded: Any = load_model(at.seed.model_copy(update={"files": at.store.put_folder(ours)}), at.store, device="cpu")
    in_peft_BT = _logp(load_model(at.seed, at.store, lora, "cpu"), at)
    _compare(_logp(folded, at), in_peft_BT, at.equal, "folding an adapter gives other probabilities than PEFT")
    return folded, in_peft_BT


def _like(expert: Expert, at: Copy, store: Store) -> dict[str, str]:
    """An adapter with the settings of another over the copy, with random weights; none where they name places that it does not have."""
    from elmwood.lm.adapters.peft_import import LoraConfig, get_peft_model
    from elmwood.lm.load import load_model
    from elmwood.train.adopt import SETTINGS

    made = at.folder / "like"
    try:
        said = read_settings(store.folder(expert.files) / "adapter_config.json", dora=True)
        config = LoraConfig(task_type="CAUSAL_LM", **{key: said[key] for key in SETTINGS if key in said})
        model: Any = get_peft_model(load_model(at.seed, at.store, device="cpu"), config)
    except (ValueError, TypeError):
        return {}
    _shake(model)
    model.save_pretrained(made, save_embedding_layers=False)
    (made / "README.md").unlink(missing_ok=True)
    return at.store.put_folder(made)


def _shake(model: Any) -> None:
    """Random numbers in an adapter."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name and weight.dim() > 1:
                weight.copy_(torch.randn_like(weight) / math.sqrt(weight.shape[-1] * RANK))


def _combine(at: Copy, lora: Expert | None, full: Expert | None) -> None:
    """The adapter folded as PEFT folds it, and the mean of both experts."""
    import torch

    from elmwood.lm.load import load_model
    from elmwood.merge.checkpoint import Answer, merge
    from elmwood.merge.layer_weights import everywhere
    from elmwood.train.loss import base_model

    if lora is None:
        return
    folded, _ = _fold(at, lora)
    if full is None:
        return
    (made,) = merge(at.seed, {one.digest: everywhere(1.0) for one in (lora, full)}, [Answer("average", {})], at.store)
    whole, merged = (load_model(at.seed, at.store, one, "cpu") for one in (full, made))
    with torch.no_grad():
        mean = base_model(folded)
        for weight, other in zip(mean.parameters(), whole.parameters(), strict=True):
            weight.add_(other).div_(2)
    _compare(_logp(merged, at), _logp(mean, at), at.equal, "a merge of two experts is not the mean of their weights")


def _logp(model: Any, at: Copy) -> "Tensor":
    """log p of each token but the first [B, T - 1]."""
    import torch

    with torch.no_grad():
        logits_BTV = model(input_ids=at.tokens_BT[:, :-1], use_cache=False).logits.float()
    return logits_BTV.log_softmax(-1).gather(-1, at.tokens_BT[:, 1:, None])[..., 0]


def _compare(found: "Tensor", wanted: "Tensor", equal: float, differs: str) -> None:
    """Raises Differs."""
    if not bool(((found - wanted).abs() <= equal).all()):
        raise Differs(differs)
