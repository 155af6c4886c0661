"""Text from any LM, token by token, and the share of each expert in it.

V vocabulary
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from elmwood.corpus.tokens import token_bytes
from elmwood.errors import BadInput
from elmwood.lm.interface import LM


class Step(NamedTuple):
    """One token of generated text. The pieces of all steps join to the text; a piece is empty while a character is unfinished."""

    text: str
    token: int
    logprob: float  # of the token under the model itself, before temperature
    weights: Mapping[str, float]  # of the candidates that predicted it, by name


def generate(
    lm: LM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rng_seed: int = 0,
    stops: frozenset[int] | None = None,
) -> Iterator[Step]:
    """Continue a prompt until the model ends its text, `max_tokens` are generated or the context is full.

    The prompt is a text, or its tokens from the separator on. `stops`: tokens that end the text, by default the model's own.
    Temperature 0 takes the most likely token; top_p samples from the most likely tokens that together have this probability. The same
    settings give the same text on the same machine. Raises BadInput.
    """
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise BadInput(f"temperature {temperature} and top_p {top_p}: the first must not be negative, the second above 0 and at most 1")
    tokens = [lm.separator, *tokenizer.encode(prompt, add_special_tokens=False).ids] if isinstance(prompt, str) else list(prompt)
    if len(tokens) >= lm.context:
        raise BadInput(f"the prompt has {len(tokens)} tokens, the model reads {lm.context} at most: shorten it")
    stops = lm.stops if stops is None else stops
    spelled = token_bytes(tokenizer)
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    generator = torch.Generator().manual_seed(rng_seed)
    logp_V, cache = lm.extend(tokens, lm.start())
    room = min(max_tokens, lm.context - len(tokens))
    for made in range(1, room + 1):
        token = sample(logp_V, temperature, top_p, generator)
        ended = token in stops
        last = ended or made == room
        text = decode(b"" if ended or token >= len(spelled) else spelled[token], last)
        yield Step(text, token, float(logp_V[token]), dict(cache.shares))
        if last:
            return
        logp_V, cache = lm.extend([token], cache)


def sample(logp_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose a token id."""
    if temperature == 0:
        return int(logp_V.argmax())
    p_V, order_V = torch.softmax(logp_V / temperature, -1).sort(descending=True, stable=True)
    before_V = p_V.cumsum(-1) - p_V
    return int(order_V[torch.multinomial(p_V * (before_V < top_p), 1, generator=generator)])
