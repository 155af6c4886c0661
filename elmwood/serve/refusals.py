"""What the server refuses, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from starlette.responses import JSONResponse

from elmwood.ensemble.batch.interface import Busy
from elmwood.errors import BadInput, ElmwoodError, shorten

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(ElmwoodError):
    """A request that is not answered. `param` names the field that is wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})


def refusal_of(error: Exception) -> Refused:
    """Any error as a refusal; what is not ours says nothing of itself."""
    match error:
        case Refused():
            return error
        case Busy():
            return Refused(429, str(error), code="queue_full", headers={"Retry-After": f"{max(1, ceil(error.retry_s))}"})
        case BadInput():
            return Refused(400, str(error))
        case MemoryError():
            return Refused(503, "memory ran out: ask for less at once, or again later", code="out_of_memory", headers={"Retry-After": "5"})
    return Refused(500, "the server made a mistake; it is in its log", code="internal_error")


def body_of(error: Refused) -> dict[str, Any]:
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": shorten(str(error)), "type": kind, "param": error.param, "code": error.code}}


def reply_of(error: Refused) -> JSONResponse:
    return JSONResponse(body_of(error), error.status, error.headers)
