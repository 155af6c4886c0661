"""What is refused, in OpenAI's shape, naming the field; keys, origins, bodies; the log."""

import io
import json
import logging
import sys

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elmwood.errors import BadInput, UnknownName
from elmwood.report.connections import names_of
from elmwood.serve.app import BODY, create_app
from elmwood.serve.logs import Lines, start_log
from elmwood.serve.messages import SHAPES
from elmwood.serve.model import open_served
from elmwood.serve.run import read_keys
from tests.serve.conftest import serving

CHAT = [{"role": "user", "content": "hi"}]
WRONG = [  # path, body, status, param, code
    ("completions", {}, 400, "prompt", "invalid_value"),
    ("completions", {"prompt": None}, 400, "prompt", "invalid_value"),
    ("completions", {"prompt": []}, 400, "prompt", None),
    ("completions", {"prompt": [[]]}, 400, "prompt", None),
    ("completions", {"prompt": [5, 10**7]}, 400, "prompt", None),
    ("completions", {"prompt": [5, -1]}, 400, "prompt", None),
    ("completions", {"prompt": "a " * 500}, 400, "prompt", "context_length_exceeded"),
    ("completions", {"prompt": "a" * 3_000_000}, 400, "prompt", "context_length_exceeded"),
    ("completions", {"prompt": "\ud800"}, 400, "prompt", None),
    ("completions", {"prompt": ["a"] * 200}, 400, "prompt", None),
    ("completions", {"prompt": "a", "model": "nobody"}, 404, "model", "model_not_found"),
    ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
    ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of", "unsupported_parameter"),
    ("completions", {"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter"),
    ("completions", {"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty", "unsupported_parameter"),
    ("completions", {"prompt": "a", "max_token": 5}, 400, "max_token", "unknown_parameter"),
    ("completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "invalid_value"),
    ("completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "invalid_value"),
    ("completions", {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "invalid_value"),
    ("completions", {"prompt": "a", "temperature": -0.1}, 400, "temperature", "invalid_value"),
    ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p", "invalid_value"),
    ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ("completions", {"prompt": "a", "n": 0}, 400, "n", "invalid_value"),
    ("completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs", "invalid_value"),
    ("completions", {"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "invalid_value"),
    ("completions", {"prompt": "a", "stop": ""}, 400, "stop", "invalid_value"),
    ("completions", {"prompt": "a", "elmwood": {"only": ["nobody"]}}, 400, "elmwood", "unknown_expert"),
    ("completions", {"prompt": "a", "elmwood": {"what": 1}}, 400, "elmwood", "invalid_value"),
    ("completions", {"prompt": "a", "elmwood": {"only": ["seed"], "without": ["seed"]}}, 400, "elmwood", "invalid_value"),
    ("completions", {"prompt": "a", "model": "seed", "elmwood": {"without": ["seed"]}}, 400, "elmwood", "invalid_value"),
    ("chat/completions", {"messages": []}, 400, "messages", "invalid_value"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "invalid_value"),
    ("chat/completions", {"messages": CHAT, "tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    ("chat/completions", {"messages": CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "chat_template"),
    ("chat/completions", {"messages": CHAT, "max_completion_tokens": -2}, 400, "max_completion_tokens", "invalid_value"),
    ("embeddings", {"input": "a"}, 400, None, "unsupported"),
    ("route", {}, 400, "prompt", "invalid_value"),
    ("nothing", {}, 404, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), WRONG)
def test_what_is_wrong_is_named(http, path, body, status, param, code):
    reply = http.post(f"/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    assert code is None or error["code"] == code


def test_what_fits_none_of_several_shapes_is_told_all_of_them(http):
    for field, value in (("stop", ["a"] * 5), ("prompt", [[1], ["a"]])):
        message = http.post("/v1/completions", json={"prompt": "a", field: value}).json()["error"]["message"]
        assert message == f"{field}: it is {SHAPES[field]}"
    message = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": 5}]}).json()["error"]["message"]
    assert message == f"messages.0.content: it is {SHAPES['content']}"


def test_fields_that_ask_for_nothing_are_taken(http):
    body = {
        "prompt": "a", "max_tokens": 1, "suffix": None, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
        "user": "me", "stop": None, "stream_options": None, "n": None, "temperature": None, "seed": None,
    }  # fmt: skip
    assert http.post("/v1/completions", json=body).status_code == 200
    chat = {"messages": CHAT, "max_tokens": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200


def test_bodies_are_bounded_and_json(http):
    plain = {"content-type": "application/json"}
    for content, headers, status in (
        (b"{}", {"content-type": "text/plain"}, 415), (b"", {}, 415), (b"{", plain, 400), (b"[1]", plain, 400), (b"\xff", plain, 400),
        (b'{"prompt": "a", "top_p": NaN}', plain, 400), (b"[" * 100_000, plain, 400), (b" " * (BODY + 1), plain, 413),
        (b"{}", plain | {"content-encoding": "gzip"}, 415), (b'{"seed": ' + b"9" * 5000 + b"}", plain, 400),
    ):  # fmt: skip
        reply = http.post("/v1/completions", content=content, headers=headers)
        assert reply.status_code == status, (content[:20], reply.text)
        assert reply.json()["error"]["message"]
    assert http.get("/v1/completions").status_code == 405


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["only", "type", "role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
PATHS = ["completions", "chat/completions", "route"]
FIELDS = [
    "model",
    "prompt",
    "messages",
    "temperature",
    "top_p",
    "n",
    "stop",
    "stream_options",
    "logprobs",
    "seed",
    "elmwood",
    "echo",
    "tools",
]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.dictionaries(st.sampled_from(FIELDS), values, max_size=4), path=st.sampled_from(["completions", "chat/completions", "route"])
)
def test_no_body_breaks_the_server(http, body, path):
    reply = http.post(f"/v1/{path}", json=body | {"max_tokens": 1})
    assert reply.status_code in (200, 400, 404), reply.text
    assert reply.status_code == 200 or reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def guarded(world):
    """A server of a seed without a chat template, with keys, for pages of one origin, behind one name."""
    app = create_app(
        open_served(world.plain, world.store), keys=["k" * 20, "other-key-of-20-char"], cors=["https://page.example"],
        names=names_of("127.0.0.1", ["proxy.example"]),
    )  # fmt: skip
    with serving(app) as address, httpx.Client(base_url=address, trust_env=False) as client:
        yield client


def test_a_page_of_the_web_whose_name_was_rebound_gets_nothing(guarded):
    for host, status in (("evil.example", 421), ("proxy.example", 200), ("localhost:1", 200), ("127.0.0.1", 200)):
        reply = guarded.get("/healthz", headers={"host": host})
        assert reply.status_code == status
        assert status == 200 or reply.json()["error"]["code"] == "host"


def test_keys_and_origins(guarded):
    key = {"authorization": f"Bearer {'k' * 20}"}
    assert guarded.get("/v1/models").status_code == 401
    assert guarded.get("/v1/models", headers={"authorization": "Bearer wrong"}).json()["error"]["code"] == "invalid_api_key"
    assert guarded.get("/v1/models", headers={"authorization": "bearer other-key-of-20-char"}).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics"):
        assert guarded.get(path).status_code == 200
    for path in ("/tokenizer_info", "/v1/experts", "/healthz/../v1/models"):
        assert guarded.get(path).status_code in (401, 404)
    refused = guarded.post("/v1/chat/completions", json={"messages": CHAT}, headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_chat_template")
    asked = {"origin": "https://page.example", "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert guarded.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == "https://page.example"
    assert (
        "access-control-allow-origin" not in guarded.options("/v1/completions", headers=asked | {"origin": "https://evil.example"}).headers
    )


def test_no_origin_is_allowed_by_default(http):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    reply = http.options("/v1/completions", headers=asked)
    assert reply.status_code == 405
    assert "access-control-allow-origin" not in reply.headers


def test_key_files_are_checked(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# mine\n\n" + "a" * 16 + "\n")
    assert read_keys(path) == ["a" * 16]
    for text in ("# none\n", "short\n"):
        path.write_text(text)
        with pytest.raises(BadInput):
            read_keys(path)


def test_the_log_has_a_line_for_each_request_and_no_text(http, caplog, monkeypatch):
    logger = logging.getLogger("elmwood.serve")
    monkeypatch.setattr(logger, "propagate", True)  # a verb that ran in this process may have started a log
    with caplog.at_level(logging.INFO, logger="elmwood.serve"):
        reply = http.post("/v1/completions", json={"prompt": "the secret sea", "max_tokens": 2}, headers={"x-request-id": "one"})
        http.post("/v1/completions", json={"prompt": 5}, headers={"x-request-id": "two"})
    lines = [json.loads(Lines(True).format(record)) for record in caplog.records if record.name == logger.name]
    mine = {line["id"]: line for line in lines if line["event"] == "request"}
    assert reply.headers["x-request-id"] == "one"
    assert (mine["one"]["status"], mine["one"]["path"], mine["one"]["completion_tokens"]) == (200, "/v1/completions", 2)
    assert mine["two"]["status"] == 400
    assert "secret" not in json.dumps(lines)
    assert "status=200" in Lines(False).format(caplog.records[0])
    with pytest.raises(UnknownName):
        start_log("loud")


def test_the_log_goes_to_what_stderr_is_then(caplog, monkeypatch):
    logger = logging.getLogger("elmwood.serve")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    with caplog.at_level(logging.INFO, logger=logger.name):
        with io.StringIO() as before:
            monkeypatch.setattr(sys, "stderr", before)
            start_log("text")
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        logger.info("a line")
    assert sys.stderr.getvalue().endswith("info a line\n")
