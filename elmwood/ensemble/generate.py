"""Text from any LM, token by token, and the share of each expert in it."""

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from elmwood.corpus.tokens import token_bytes
from elmwood.ensemble.decode import Drawn, Rule, can_decode, decode, pick
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
    in_place: bool | None = None,
) -> Iterator[Step]:
    """Continue a prompt until the model ends its text, `max_tokens` are generated or the context is full.

    The prompt is a text, or its tokens from the separator on. `stops`: tokens that end the text, by default the model's own.
    Temperature 0 takes the most likely token; top_p samples from the most likely tokens that together have this probability. The same
    settings give the same text on the same machine. `in_place`: decode as on a GPU (decode.py), the default there. Raises BadInput.
    """
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise BadInput(f"temperature {temperature} and top_p {top_p}: the first must not be negative, the second above 0 and at most 1")
    tokens = [lm.separator, *tokenizer.encode(prompt, add_special_tokens=False).ids] if isinstance(prompt, str) else list(prompt)
    if len(tokens) >= lm.context:
        raise BadInput(f"the prompt has {len(tokens)} tokens, the model reads {lm.context} at most: shorten it")
    stops = lm.stops if stops is None else stops
    spelled = token_bytes(tokenizer)
    spell = codecs.getincrementaldecoder("utf-8")("replace").decode
    generator = torch.Generator().manual_seed(rng_seed)
    rule, room = Rule(temperature, top_p), min(max_tokens, lm.context - len(tokens))

    def chance() -> float:
        return float(torch.rand(1, generator=generator))

    drawn = decode(lm, tokens, room, rule, chance) if can_decode(lm, in_place) else _extend(lm, tokens, room, rule, chance)
    for made, (token, logprob, shares) in enumerate(drawn, 1):
        ended = token in stops
        last = ended or made == room
        text = spell(b"" if ended or token >= len(spelled) else spelled[token], last)
        yield Step(text, token, logprob, shares)
        if last:
            return


def _extend(lm: LM, tokens_T: Sequence[int], room: int, rule: Rule, chance: Callable[[], float]) -> Iterator[Drawn]:
    """As `decode`, for any LM: each token is chosen here before it is read."""
    logp_V, cache = lm.extend(tokens_T, lm.start())
    for made in range(1, room + 1):
        token = int(pick(logp_V, rule, torch.tensor(chance())))
        yield Drawn(token, float(logp_V[token]), dict(cache.shares))
        if made < room:
            logp_V, cache = lm.extend([token], cache)
