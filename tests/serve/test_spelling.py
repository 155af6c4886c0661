"""The grammar of a stream, for any tokens, stop strings and events: pieces join to the answer, and end where they must."""

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from elmwood.ensemble.batch.interface import Ended, Request, Said
from elmwood.serve.answers import Choice
from elmwood.serve.completions import Chats, Completions
from elmwood.serve.spelling import Speller, name_of

WORDS = [b"", *(bytes([byte]) for byte in range(256)), "é".encode(), "海猫".encode(), b"ab", b"ba", b"aba", b" the", b"\n\n"]
ODD = [WORDS.index(word) for word in (b"a", b"b", b"\n", b"ab", b"ba", b"aba", "é".encode(), b"\xe6", b"\xb5", b"\xb7", b"\xff", b"")]
tokens = st.lists(st.one_of(st.sampled_from(ODD), st.integers(0, len(WORDS) - 1)), max_size=30)
stops = st.lists(st.text("ab\né海", min_size=1, max_size=4), max_size=4)


def said(token, prompt=False):
    return Said(token, -1.0, (), {"seed": 1.0}, prompt)


@settings(deadline=None, max_examples=300)
@given(tokens, stops)
def test_pieces_join_to_the_text_before_its_first_stop_string(made, ends):
    whole = b"".join(WORDS[token] for token in made).decode(errors="replace")
    cuts = [place for stop in ends if (place := whole.find(stop)) >= 0]
    speller, pieces = Speller(WORDS, ends), []
    for token in made:
        pieces.append(speller.push(said(token)))
        if speller.stopped:
            break
    else:
        pieces.append(speller.end())
    text = "".join(piece.text for piece in pieces)
    assert text == (whole[: min(cuts)] if speller.stopped else whole)
    assert speller.stopped == bool(cuts)
    placed = [one for piece in pieces for one in piece.tokens]
    starts = [one.start for one in placed]
    assert starts == sorted(starts)
    assert [one.said.token for one in placed] == made[: len(placed)]
    sent = 0
    for piece in pieces:
        assert all(one.start >= sent or not WORDS[one.said.token] for one in piece.tokens), "a token comes with the text that it begins"
        assert not piece.text or sent == 0 or piece.tokens or ends, "text comes with its tokens"
        sent += len(piece.text)
    assert all(start <= len(text) for start in starts)
    assert speller.stopped or len(placed) == len(made)


@settings(deadline=None, max_examples=200)
@given(tokens, tokens, stops, st.booleans(), st.sampled_from(["stop", "length"]))
def test_a_choice_ends_once_and_its_deltas_join(prompt, made, ends, echo, reason):
    given_tokens = [WORDS.index(b"a"), *prompt]
    choice = Choice(0, given_tokens, 0, WORDS, ends, Request(tuple(given_tokens), 99, echo=echo))
    events = [said(token, True) for token in prompt] * echo + [said(token) for token in made] + [Ended(reason)]
    deltas = []
    for event in events:
        deltas += choice.hear(event)
        if choice.finish:
            break
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish == choice.finish
    assert all(delta.piece.text or delta.piece.tokens for delta in deltas[:-1])
    text = "".join(delta.piece.text for delta in deltas)
    before = b"".join(WORDS[token] for token in given_tokens).decode(errors="replace") if echo else ""
    assert text.startswith(before), "stop strings do not look at the prompt"
    json.dumps(text).encode()
    placed = [one for delta in deltas for one in delta.piece.tokens]
    assert all(one.start <= after.start <= len(text) for one, after in pairwise(placed))
    assert not any(stop in text[len(before) :] for stop in ends)
    stopped = choice.made.stopped
    assert choice.finish == ("stop" if stopped else reason)
    assert choice.completion == len(made) or stopped


class Words:
    """What the styles of answers ask of a model: how its tokens are spelled."""

    spelled = WORDS

    @staticmethod
    def token_name(token):
        return name_of(WORDS[token], f"<{token}>")


def joined(parts):
    """Lists of a stream's parts, one after another; None where there are none."""
    if parts[0] is None:
        assert all(part is None for part in parts)
        return None
    return {name: [one for part in parts for one in part[name]] for name in parts[0]}


@settings(deadline=None, max_examples=150)
@given(tokens, tokens, stops, st.booleans(), st.sampled_from([None, 0, 2]), st.sampled_from(["stop", "length"]))
def test_a_stream_s_events_join_to_the_answer_without_a_stream(prompt, made, ends, echo, logprobs, reason):
    given_tokens = [WORDS.index(b"a"), *prompt]
    choice = Choice(0, given_tokens, 0, WORDS, ends, Request(tuple(given_tokens), 99, echo=echo))
    deltas = []
    for event in [said(token, True) for token in prompt] * echo + [said(token) for token in made] + [Ended(reason)]:
        deltas += choice.hear(event)
        if choice.finish:
            break
    text, placed = "".join(delta.piece.text for delta in deltas), [one for delta in deltas for one in delta.piece.tokens]
    for style in (Completions(Words, logprobs), Chats(Words, logprobs)):
        whole = json.loads(json.dumps(style.whole(choice, text, placed)))
        events = [f"data: {json.dumps(style.part(delta), ensure_ascii=False)}\n\n".encode() for delta in deltas]
        parts = [json.loads(event.decode().removeprefix("data: ")) for event in events]
        assert all(event.count(b"\n\n") == 1 for event in events), "an event ends where it ends, whatever is in its text"
        contents = [part["text"] if "text" in part else part["delta"].get("content", "") for part in parts]
        assert "".join(contents) == (whole["text"] if "text" in whole else whole["message"]["content"])
        assert joined([part["logprobs"] for part in parts]) == whole["logprobs"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [whole["finish_reason"]]


def test_tokens_have_names():
    assert name_of(b"", "<|end|>") == "<|end|>"
    assert name_of("é".encode(), "x") == "é"
    assert name_of(b"\xe6\xb5", "x") == "bytes:\\xe6\\xb5"
