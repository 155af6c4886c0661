"""The server as a stock client sees it."""

import math

import openai
import pytest

from elmwood.ensemble.mixture import open_model

PROMPT = "the captain sailed over the sea"


def test_text_is_continued_and_counted(client, served):
    for model in ("auto", "seed", served.sorted[0], served.sorted[1][:10]):
        made = client.completions.create(model=model, prompt=PROMPT, max_tokens=9, temperature=0.7, seed=3)
        assert made.model == model
        assert made.object == "text_completion"
        assert made.system_fingerprint == served.fingerprint
        (choice,) = made.choices
        assert choice.finish_reason == "length"
        assert choice.logprobs is None
        assert made.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
            "prompt_tokens": len(served.encode(PROMPT)), "completion_tokens": 9, "total_tokens": len(served.encode(PROMPT)) + 9,
        }  # fmt: skip
        again = client.completions.create(model=model, prompt=PROMPT, max_tokens=9, temperature=0.7, seed=3)
        assert again.choices[0].text == choice.text


def test_echo_is_the_table(client, served, world):
    tokens = served.encode(PROMPT)
    for model, record in (("auto", world.ensemble), ("seed", world.seed), (world.experts[0].digest, world.experts[0])):
        table = open_model(record, world.store).score([tokens])[0, 1:].tolist()
        for logprobs in (0, 2):
            made = client.completions.create(model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=logprobs).choices[0]
            assert made.text == PROMPT
            assert made.logprobs.token_logprobs == pytest.approx(table, abs=1e-5)
            assert "".join(made.logprobs.tokens) == PROMPT
        given = client.completions.create(model=model, prompt=tokens, max_tokens=3, echo=True, logprobs=2, temperature=0).choices[0]
        assert given.logprobs.token_logprobs[0] is None
        assert given.logprobs.top_logprobs[0] is None
        assert given.logprobs.token_logprobs[1:-3] == pytest.approx(table, abs=1e-5)
        for top, logprob in zip(given.logprobs.top_logprobs[-3:], given.logprobs.token_logprobs[-3:], strict=True):
            assert max(top.values()) == logprob, "greedy"
            assert len(top) <= 3


def test_choices_prompts_and_their_indices(client, served):
    tokens = served.encode("the cat")
    for prompts in (["the cat", "the sea"], [tokens, served.encode("the sea")]):
        made = client.completions.create(model="auto", prompt=prompts, n=2, max_tokens=4, seed=1, stop=[])
        assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
        assert made.usage.prompt_tokens == len(tokens) + len(served.encode("the sea"))
        assert made.usage.completion_tokens <= 16
        assert made.choices[0].text != made.choices[1].text
    alone = client.completions.create(model="auto", prompt="the cat", max_tokens=4, seed=1)
    assert alone.choices[0].text == made.choices[0].text


def test_a_stream_joins_to_the_answer(client, served):
    for api, words in (
        (client.completions, {"prompt": PROMPT}),
        (client.chat.completions, {"messages": [{"role": "user", "content": "go"}]}),
    ):
        chat = api is client.chat.completions
        wish = {"model": "auto", "max_tokens": 12, "seed": 5, "n": 2, "logprobs": True if chat else 1, **words}
        whole = api.create(**wish)
        parts = list(api.create(**wish, stream=True, stream_options={"include_usage": True}))
        *parts, last = parts
        assert last.choices == []
        assert last.usage == whole.usage
        assert all(part.usage is None for part in parts)
        assert {part.id for part in parts} == {last.id}
        for choice in whole.choices:
            own = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
            text = "".join((part.delta.content or "") if chat else part.text for part in own)
            assert text == (choice.message.content if chat else choice.text)
            assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
            if chat:
                assert own[0].delta.role == "assistant"
                found = [one for part in own if part.logprobs for one in part.logprobs.content]
                assert [one.logprob for one in found] == pytest.approx([one.logprob for one in choice.logprobs.content])
                assert bytes(byte for one in found for byte in one.bytes).decode(errors="replace") == text
            else:
                offsets = [start for part in own for start in part.logprobs.text_offset]
                assert offsets == choice.logprobs.text_offset


def test_stop_strings_end_text_before_them(client):
    whole = client.completions.create(model="auto", prompt=PROMPT, max_tokens=30, seed=2).choices[0].text
    for first, size in ((3, 2), (5, 4), (len(whole) // 2, 1)):
        stop = whole[first : first + size]
        made = client.completions.create(model="auto", prompt=PROMPT, max_tokens=30, seed=2, stop=[stop, "never said"], logprobs=0)
        assert made.choices[0].text == whole[: whole.index(stop)]
        assert made.choices[0].finish_reason == "stop"
        assert all(start < max(1, len(made.choices[0].text)) for start in made.choices[0].logprobs.text_offset)
        assert made.usage.completion_tokens >= len(made.choices[0].logprobs.tokens)
        streamed = client.completions.create(model="auto", prompt=PROMPT, max_tokens=30, seed=2, stop=stop, stream=True)
        assert "".join(part.choices[0].text for part in streamed) == made.choices[0].text


def test_chats_are_rendered_by_the_seed_s_template(client, served, http):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "the sea"}]}]
    made = client.chat.completions.create(
        model="auto", messages=messages, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    text = "system: be brief\nuser: the sea\nassistant: "
    assert made.usage.prompt_tokens == len(served.encode(text, begin=False))
    assert made.choices[0].message.role == "assistant"
    for one in made.choices[0].logprobs.content:
        assert one.logprob == max(other.logprob for other in one.top_logprobs)
    plain = client.completions.create(model="auto", prompt=served.encode(text, begin=False), max_tokens=5, temperature=0)
    assert plain.choices[0].text == made.choices[0].message.content
    back = [*messages, made.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    client.chat.completions.create(model="auto", messages=back, max_tokens=1)
    rest = client.chat.completions.create(model="auto", messages=messages, seed=1)
    assert rest.usage.total_tokens <= served.engine.context
    with pytest.raises(openai.BadRequestError, match="no role pirate"):
        client.chat.completions.create(model="auto", messages=[{"role": "pirate", "content": "arr"}])


def test_models_and_experts(client, served, http, world):
    assert [model.id for model in client.models.list()] == ["forests/small", "auto", "seed"]
    for name in ("forests/small", "auto", "seed", served.sorted[2], served.cards[served.sorted[0]].name):
        assert client.models.retrieve(name).object == "model"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("nobody")
    assert refused.value.code == "model_not_found"
    found, cursor = [], ""
    for _ in range(2):
        page = http.get("/v1/experts", params={"limit": 2, "cursor": cursor}).json()
        found += [card["id"] for card in page["data"]]
        cursor = page["next_cursor"]
    assert found == served.sorted
    assert not page["has_more"]
    name = served.cards[served.sorted[1]].name
    assert [card["id"] for card in http.get("/v1/experts", params={"q": name}).json()["data"]] == [served.sorted[1]]
    assert http.get("/v1/experts", params={"limit": "0"}).status_code == 400


def test_provenance_says_which_experts_answered(http, served):
    wish = {"prompt": PROMPT, "max_tokens": 6, "seed": 4, "elmwood": {"provenance": True, "tokens": True}}
    body = http.post("/v1/completions", json=wish).json()
    said = body["choices"][0]["elmwood"]
    assert body["elmwood"]["model"] == served.record.digest
    assert body["elmwood"]["router"]["router"] == "centroid"
    assert sum(one["weight"] for one in said["experts"]) == pytest.approx(1, abs=1e-4)
    assert {one["id"] for one in said["candidates"]} == {*served.sorted, "seed"}
    assert all(one["distance2"] is not None for one in said["candidates"])
    assert len(said["by_token"]) == 6
    for one in said["by_token"]:
        assert sum(one["weights"].values()) == pytest.approx(1, abs=1e-4)
    assert "elmwood" not in http.post("/v1/completions", json={"prompt": PROMPT}).json()
    first, second, _ = served.sorted
    for extra, allowed in (
        ({"only": [first]}, {first}), ({"without": [first, "seed"]}, {second, served.sorted[2]}),
        ({"only": [served.cards[second].name, first]}, {first, second}),
    ):  # fmt: skip
        body = http.post("/v1/completions", json=wish | {"elmwood": wish["elmwood"] | extra}).json()
        assert {one["id"] for one in body["choices"][0]["elmwood"]["experts"]} <= allowed
    route = http.post("/v1/route", json={"prompt": PROMPT}).json()
    assert route["candidates"] == said["candidates"]
    assert http.post("/v1/route", json={"messages": [{"role": "user", "content": "sea"}], "model": first}).json()["candidates"] == [
        {"id": first, "name": served.cards[first].name, "distance2": None, "weight": 1.0}
    ]


def test_words_there_and_back(http, served):
    text = "naïve café, 海 and <|endoftext|>"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == served.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"] == found["tokens"][1:]
    assert http.post("/detokenize", json={"tokens": found["tokens"][1:]}).json()["prompt"] == text
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    assert info["model_max_length"] == served.engine.context


def test_log_probabilities_are_of_the_model(client):
    cool = client.completions.create(model="auto", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=0).choices[0].logprobs
    warm = client.completions.create(model="auto", prompt=PROMPT, max_tokens=8, temperature=1e-9, logprobs=0).choices[0].logprobs
    assert cool.tokens == warm.tokens
    assert cool.token_logprobs == pytest.approx(warm.token_logprobs)
    assert all(-20 < logprob <= 0 and math.isfinite(logprob) for logprob in cool.token_logprobs)


def test_health_and_metrics(http, served):
    assert http.get("/healthz").json()["state"] == "up"
    assert http.get("/readyz").json() == {"state": "ready", "model": served.record.digest}
    http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3})
    text = http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = '{model_name="forests/small"}'
    assert float(lines["vllm:num_requests_waiting" + label]) == 0
    assert float(lines["elmwood_generation_mismatches_total" + label]) == 0
    assert float(lines["vllm:generation_tokens_total" + label]) >= 3
    assert float(lines["vllm:time_to_first_token_seconds_count" + label]) >= 1
    assert float(lines["elmwood_route_entropy_nats_count" + label]) >= 3
    assert f'digest="{served.record.digest}"' in text
    reply = http.get("/healthz", headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    assert len(http.get("/healthz", headers={"x-request-id": 'a"b'}).headers["x-request-id"]) == 32
