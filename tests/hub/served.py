"""An app of a hub that answers at an address of this machine, in a thread."""

import socket
import threading
from contextlib import contextmanager

import uvicorn

from elmwood.hub.app import create_app
from elmwood.report.connections import Prompt


def serve(hub):
    """The address of an app of this hub, which ends with the block."""
    return serve_app(create_app(hub))


@contextmanager
def serve_app(app):
    """The address of an app, which ends with the block."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    server = uvicorn.Server(uvicorn.Config(app, http=Prompt, log_level="critical", lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
