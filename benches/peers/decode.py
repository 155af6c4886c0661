"""Milliseconds per token at batch 1: a top-k ensemble of LoRA experts against one expert, the plain model and PEFT.

    python -m benches.peers.decode [--shape 135M] [--experts 4] [--rank 16] [--tokens 24] [--rounds 5] [--threads 2]

One JSON line per way of decoding: seconds per token, and ratios. "ensemble" includes everything: routing by the text so far, one pass,
mixing. "peft switching" runs one adapter after the other (top-k passes).
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import DynamicCache

from benches import common
from benches.models import Spent, experts, model, rounds, say_rounds, spent
from benches.models import seed as make_seed
from elmwood.corpus.build import build
from elmwood.domains.partition import partition
from elmwood.ensemble.mixture import open_model
from elmwood.records import Ensemble, Forest
from elmwood.store import Store

warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT 0.21 with transformers 5.23
PROMPT = 64


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", default="135M")
    for name, value in (("experts", 4), ("rank", 16), ("tokens", 24), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        tasks = ways(options, Path(folder))
        say_rounds("decode", rounds(tasks, options.rounds), ("plain", "one expert"), **vars(options))


def ways(options: argparse.Namespace, folder: Path) -> dict:
    """Name -> a function that decodes `tokens` tokens after a prompt and returns the seconds of one token."""
    store = Store(folder / "store")
    seed, base = make_seed(options.shape, store), model(options.shape)
    parted = domains(options.experts, folder, store)
    forest = Forest(
        seed=seed.digest,
        partition=parted.digest,
        experts=tuple(e.digest for e in experts(seed, base, options.experts, options.rank, store, partition=parted.digest)),
    )
    store.add(forest)
    ensemble = open_model(Ensemble(forest=forest.digest, router="uniform", top_k=options.experts), store, "cpu")
    one = open_model(ensemble.experts.experts[0], store, "cpu")
    plain = open_model(seed, store, "cpu")
    adapted = [store.folder(expert.files) for expert in ensemble.experts.experts]
    names = [str(n) for n in range(options.experts)]
    peft = PeftModel.from_pretrained(base, adapted[0], adapter_name="0")
    for name, path in zip(names[1:], adapted[1:], strict=True):
        peft.load_adapter(path, adapter_name=name)
    peft.eval()
    return {
        "plain": lambda: hugging_face(model_of(plain), 1, options.tokens),
        "plain, our cache": lambda: ours(plain, options.tokens),
        "one expert": lambda: ours(one, options.tokens),
        "ensemble": lambda: ours(ensemble, options.tokens),
        "peft, one expert": lambda: hugging_face(peft, 1, options.tokens),
        "peft, mixed batch": lambda: hugging_face(peft, options.experts, options.tokens, adapter_names=names),
        "peft, switching": lambda: switching(peft, names, options.tokens),
    }


def model_of(lm):
    """The transformers model below an LM of the seed."""
    return lm.experts.body(-1).model


def domains(count: int, folder: Path, store: Store):
    """A partition, for routing to have something to do."""
    topics = [words.split() for words in ("sea ship sail harbour", "def return import class", "jardin pomme maison", "proof lemma theorem")]
    (folder / "text").mkdir()
    for number in range(40 * count):
        topic = topics[number % len(topics)]
        text = " ".join(f"{topic[(number // 7 + n) % len(topic)]} {'abcdefghij'[n % 10] * 3}{n}" for n in range(number + 20))
        (folder / "text" / f"{number}.txt").write_text(text)
    return partition(build([str(folder / "text")], store), store, domains=count)


def ours(lm, count: int) -> Spent:
    _, cache = lm.extend(list(range(1, PROMPT + 1)), lm.start())

    def decode() -> None:
        text = cache
        for number in range(count):
            _, text = lm.extend([60 + number], text)

    return spent(decode, count)


def hugging_face(model, batch: int, count: int, **names) -> Spent:
    cache = DynamicCache(config=model.config)
    prompt = torch.arange(1, PROMPT + 1, device=model.device).expand(batch, -1)
    model(input_ids=prompt, cache=cache, use_cache=True, logits_to_keep=1, **names)

    def decode() -> None:
        for number in range(count):
            token = torch.full((batch, 1), 60 + number, device=model.device)
            model(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1, **names).logits.log_softmax(-1)

    return spent(decode, count)


def switching(peft, names: list[str], count: int) -> Spent:
    caches = [DynamicCache(config=peft.config) for _ in names]

    def read(tokens: torch.Tensor) -> None:
        for name, cache in zip(names, caches, strict=True):
            peft.set_adapter(name)
            peft(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1).logits.log_softmax(-1)

    read(torch.arange(1, PROMPT + 1)[None])
    return spent(lambda: [read(torch.tensor([[60 + number]])) for number in range(count)], count)


if __name__ == "__main__":
    main()
