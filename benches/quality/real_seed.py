"""Whether an expert of a real seed is better on its own domain, and on the others: seed and expert on the same held-out text.

    python -m benches.quality.real_seed STORE --seed NAME --expert NAME [--domains 0,1,2] [--documents 30] [--length 256]

The store is that of "A real seed" in docs/training.md: a seed, a partition, an expert of one of its domains. The bench reads the first
`length` tokens of held-out documents, at most `documents` of each domain, in order of id (a hash of the text). One JSON line per domain:
bits per byte of both, and the gain with its standard error over documents.

D documents of a domain, M the two models, V vocabulary
"""

from itertools import islice
from math import log
from pathlib import Path

import numpy as np
import torch

from benches.common import parser, say
from elmwood.corpus.build import documents
from elmwood.corpus.tokens import token_bytes
from elmwood.lm.experts import Experts
from elmwood.lm.files import tokenizer
from elmwood.records import Expert, Partition, Seed
from elmwood.store import Store


def ratio(value_D: np.ndarray, bytes_D: np.ndarray) -> tuple[float, float]:
    """Value per byte of a domain, and its standard error over documents (linearised, as documents differ in length)."""
    mean = value_D.sum() / bytes_D.sum()
    spread = np.sqrt(((value_D - mean * bytes_D) ** 2).sum() * len(value_D) / (len(value_D) - 1))
    return float(mean), float(spread / bytes_D.sum())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store", type=Path)
    options.add_argument("--seed", default="smollm2")
    options.add_argument("--expert", default="smol/0")
    options.add_argument("--domains", help="by comma; default: all")
    options.add_argument("--documents", type=int, default=30, help="of each domain, at most")
    options.add_argument("--length", type=int, default=256, help="tokens of each document")
    options.add_argument("--threads", type=int, default=1)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    store = Store(asked.store)
    seed, expert = store.load(asked.seed, Seed), store.load(asked.expert, Expert)
    division = store.load(expert.partition, Partition)
    words, lms = tokenizer(seed, store), Experts(seed, [expert], store)
    size_V = np.array([len(spelled) for spelled in token_bytes(words)])
    places = map(int, asked.domains.split(",")) if asked.domains else range(len(division.domains))
    for place in places:
        rows = [
            [seed.separator, *words.encode(document.text, add_special_tokens=False).ids[: asked.length - 1]]
            for document in islice(documents(division.domains[place].holdout, store), asked.documents)
        ]
        bytes_D = np.array([size_V[np.array(row[1:])].sum() for row in rows])
        bits_DM = np.array([[-float(lms.score(e, [row]).sum()) / log(2) for e in (1, 0)] for row in rows])  # the seed, the expert
        gain, error = ratio(bits_DM[:, 0] - bits_DM[:, 1], bytes_D)
        say("real_seed", **{
            "domain": division.domains[place].name, "own": place == expert.domain, "documents": len(rows),
            "bytes": int(bytes_D.sum()), "seed": round(ratio(bits_DM[:, 0], bytes_D)[0], 4),
            "expert": round(ratio(bits_DM[:, 1], bytes_D)[0], 4), "gain": round(gain, 4), "standard error": round(error, 4),
            "documents that gain": int((bits_DM[:, 0] > bits_DM[:, 1]).sum()),
        })  # fmt: skip


if __name__ == "__main__":
    main()
