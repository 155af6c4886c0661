"""Answer requests until the process is told to stop, then let those at work end."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elmwood.errors import BadInput
from elmwood.serve.app import Answers, create_app
from elmwood.serve.live import Source
from elmwood.serve.model import Served


def read_keys(path: Path) -> list[str]:
    """API keys, one a line; empty lines and those that begin with # are left out. Raises BadInput."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise BadInput(f"{path} has no API key: write one a line")
    if short := [key for key in keys if len(key) < 16]:
        raise BadInput(f"{path} has a key of {len(short[0])} characters, which can be guessed: use 16 or more")
    return keys


def serve(
    served: Served, host: str, port: int, *, keys: Sequence[str] = (), cors: Sequence[str] = (), names: Sequence[str] = (),
    source: Source | None = None, answers: Answers | None = None, drain_s: float = 30.0,
    ready: Callable[[str], None] = lambda address: None,
) -> None:  # fmt: skip
    """`ready` is told the address; `names`: that requests may use for the host; `source`: where newer models come from; `answers`: who
    answers. SIGTERM and SIGINT let requests at work end for `drain_s` seconds; no new ones are taken meanwhile."""
    import uvicorn

    from elmwood.report.connections import Prompt, names_of

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for listening in (one for server in self.servers for one in server.sockets[:1]):
                ready(f"http://{host}:{listening.getsockname()[1]}")

    config = uvicorn.Config(
        create_app(served, keys=keys, cors=cors, names=names_of(host, names), source=source, answers=answers), host=host, port=port,
        http=Prompt, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=max(1, round(drain_s)),
        timeout_keep_alive=75,
    )  # fmt: skip
    Server(config).run()
