"""What clients may ask. Fields that OpenAI has and this server has not are refused by name unless they ask for nothing; so are fields that
nobody knows, as OpenAI refuses them: a misspelled max_tokens would otherwise cost its sender a whole context."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elmwood.serve.refusals import Refused

# field -> the values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""), "best_of": (None, 1), "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}),
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []), "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False), "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]),
    "audio": (None,), "prediction": (None,), "web_search_options": (None,), "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"), "store": (None, False), "prompt_cache_retention": (None, "in_memory"),
}  # fmt: skip
WHY = {
    "suffix": "the model continues text and fills no gaps",
    "best_of": "ask for n choices with logprobs and take the best",
    "tools": "the server calls no tools", "functions": "the server calls no tools",
    "response_format": "text is not constrained",
}  # fmt: skip
SHAPES = {  # of fields that have several
    "prompt": "a text, a list of tokens, or a list of either", "stop": "a text of 1 to 256 characters, or up to 4 of them",
    "content": "a text, or a list of parts of type text",
}  # fmt: skip
IGNORED = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}  # of the sender's own books
Stop = Annotated[str, Field(min_length=1, max_length=256)]
M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Extra(Strict):
    """What an ordinary server has not."""

    provenance: bool = False  # which experts answered
    tokens: bool = False  # and with which weights at each token
    only: list[str] = Field([], max_length=64)  # experts that may answer: ids, names, or "seed"
    without: list[str] = Field([], max_length=64)


class Asked(Strict):
    """What completions and chats have in common."""

    model: str = Field("auto", max_length=300)
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=1000)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=32)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    elmwood: Extra = Extra()

    @property
    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Asked):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)


class Part(Strict):
    type: str
    text: str


class Message(Strict):
    role: str = Field(min_length=1, max_length=64)
    content: str | list[Part]
    name: str | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _sent_back(cls, given: Any) -> Any:
        """An answer of ours, as clients send it back, has fields that hold nothing."""
        return {name: value for name, value in given.items() if value not in (None, [])} if isinstance(given, dict) else given


class Chat(Asked):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class Tokenize(Strict):
    model: str = Field("auto", max_length=300)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=4096)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class Detokenize(Strict):
    model: str = Field("auto", max_length=300)
    tokens: list[int]


class Route(Strict):
    """A dry run: a text, tokens or a chat."""

    model: str = Field("auto", max_length=300)
    prompt: str | list[int] | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=4096)
    most: int = Field(32, ge=1, le=1000)  # candidates
    map: bool = False  # also where the domains and the text lie


def parse(kind: type[M], given: Any) -> M:
    """A request's body. Raises Refused."""
    if not isinstance(given, dict):
        raise Refused(400, "the body is no JSON object: send one")
    left = {}
    for name, value in given.items():
        if name in kind.model_fields:
            left[name] = value
        elif name in NEUTRAL:
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name]):
                raise Refused(400, f"{name} is not supported{f': {WHY[name]}' if name in WHY else ''}", name, "unsupported_parameter")
        elif name not in IGNORED:
            raise Refused(400, f"unrecognized request argument: {name[:100]}", name[:100], "unknown_parameter")
    try:
        return kind.model_validate({name: value for name, value in left.items() if value is not None or name == "prompt"})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = str(first["loc"][0])[:100] if first["loc"] else None
        field = next((one for one in first["loc"] if one in SHAPES), None)
        place = ".".join(map(str, first["loc"][: first["loc"].index(field) + 1] if field else first["loc"]))
        wrong = f"it is {SHAPES[field]}" if field and first["type"] != "missing" else first["msg"]
        raise Refused(400, f"{place[:200]}: {wrong[:300]}", param, "invalid_value") from error
