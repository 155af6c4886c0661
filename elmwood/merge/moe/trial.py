"""The exporter tries itself: a small model with a seed's own settings and random weights must be equalled by a mixture of its copies.

What the classes of transformers take for granted (rotary base, epsilon, normalisation of the top-k weights) differs between dense
models and mixtures, and costs quality in silence; names that are not found are filled with chance. Both show here.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from elmwood.errors import BadSeed
from elmwood.merge.moe.layout import mixed_config
from elmwood.records import fingerprint
from elmwood.store import Store

COPIES, TOKENS = 3, 48
EQUAL = 1e-5  # the largest difference of a log-probability
Write = Callable[[Mapping[str, Any], Path, int, int, Path], None]  # (config, seed's folder, copies, top_k, folder of the mixture)


def try_copies(config: Mapping[str, Any], write: Write, store: Store) -> float:
    """The largest difference over every top-k; looked at once for each setting and version of transformers. Raises BadSeed."""
    small = shrunk(config)
    key = fingerprint("copies", small, mixed_config(small, COPIES, 1), version("transformers"))
    found = next((line["difference"] for line in store.logged(key) if line.get("event") == "copies"), None)
    if found is None:
        found = _difference(small, write)
        store.log(key, event="copies", difference=found)
    if not found <= EQUAL:
        raise BadSeed(
            f"a mixture of {COPIES} copies of a {config.get('model_type')} with this seed's settings differs from it by {found:.2g} where "
            f"{EQUAL:g} is allowed: transformers {version('transformers')} reads something otherwise; use an ensemble, or report this"
        )
    return found


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with fewer and smaller layers; heads keep their size and how they share keys, since positions depend on it."""
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    few = 2 * heads // keys
    small = {"num_attention_heads": few, "num_key_value_heads": 2, "hidden_size": few * size, "head_dim": size, "intermediate_size": 96}
    small |= {"num_hidden_layers": 2, "vocab_size": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
    small |= {"sliding_window": 8} if config.get("sliding_window") else {}
    said = {key: value for key, value in config.items() if key not in ("layer_types", "max_window_layers", "torch_dtype", "auto_map")}
    return said | small | {"dtype": "float32"}


def _difference(small: Mapping[str, Any], write: Write) -> float:
    import torch  # the rest of this room does without

    from elmwood.lm.pretrained import make_config, new_model_of, open_weights

    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        dense, mixed = Path(scratch) / "dense", Path(scratch) / "mixed"
        dense.mkdir()
        (dense / "config.json").write_text(json.dumps(small), encoding="utf-8")
        seed = new_model_of(make_config(small)).eval()
        for weight in seed.parameters():
            weight.mul_(4.0) if weight.dim() > 1 else weight.add_(torch.randn_like(weight) / 4)  # louder: fresh models say nearly nothing
        seed.save_pretrained(dense)
        (dense / "config.json").write_text(json.dumps(small), encoding="utf-8")  # as silent as the seed's own
        tokens_1T = torch.randint(small["vocab_size"], (1, TOKENS))
        wanted = seed(tokens_1T).logits.log_softmax(-1)
        found = []
        for top_k in range(1, COPIES + 1):
            write(small, dense, COPIES, top_k, mixed)
            model = open_weights(mixed, dtype=torch.float32).eval()
            found.append(float((model(tokens_1T).logits.log_softmax(-1) - wanted).abs().max()))
        return max(found)
