"""How a site that is behind gets the state of another: one safetensors file over HTTP. torchft's own transport unpickles what it gets."""

import json
import shutil
import threading
import urllib.request
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchft.checkpointing import CheckpointTransport

from elmwood.errors import Damaged


class Held(NamedTuple):
    """The state of a site at the end of a round."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]  # JSON


class Transport(CheckpointTransport[dict[str, Any]]):
    """Serves this site's state to those that are behind, at this address only; and fetches the state of another."""

    def __init__(self, address: str, folder: Path):
        self.folder, self.changed, self.step = folder, threading.Condition(), -1
        outer = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 60

            def do_GET(self) -> None:
                wanted = int(self.path[1:]) if self.path[1:].isdecimal() else -1
                with outer.changed:
                    ready = outer.changed.wait_for(lambda: outer.step == wanted, self.timeout)
                    file = outer._file.open("rb") if ready else None
                if file is None:
                    return self.send_error(404)
                with file:
                    self.send_response(200)
                    self.end_headers()
                    shutil.copyfileobj(file, self.wfile)

            def log_message(self, *_: Any) -> None:
                """Nothing is printed."""

        self.server = ThreadingHTTPServer((address, 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def _file(self) -> Path:
        return self.folder / "given.safetensors"

    def metadata(self) -> str:
        """Where others fetch it."""
        return f"http://{self.server.server_address[0]!s}:{self.server.server_address[1]}"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        held: Held = state_dict["user"]["site"]
        temporary = self._file.with_suffix(".tmp")
        plain = {"site": held.plain, "torchft": state_dict["torchft"]}
        save_file({name: tensor.contiguous() for name, tensor in held.tensors.items()}, temporary, {"plain": json.dumps(plain)})
        with self.changed:
            temporary.replace(self._file)
            self.step = step
            self.changed.notify_all()

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        """Raises Damaged."""
        got = self.folder / "got.safetensors"
        with urllib.request.urlopen(f"{metadata}/{step}", timeout=timeout.total_seconds()) as answer, got.open("wb") as file:
            shutil.copyfileobj(answer, file)
        try:
            with safe_open(got, framework="pt") as opened:
                plain = json.loads(opened.metadata()["plain"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
        except Exception as error:
            raise Damaged(f"the state that {metadata} sent cannot be read ({error}): is its site of the same version?") from error
        finally:
            got.unlink()
        return {"user": {"site": Held(tensors, plain["site"])}, "torchft": plain["torchft"]}

    def shutdown(self, wait: bool = True) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
