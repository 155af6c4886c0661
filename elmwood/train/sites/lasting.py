"""Quorums of a lighthouse that may be killed and started again. torchft 0.2.0 does not come through that by itself:

- Where the lighthouse is away it tries again only when its caller has stopped waiting. Here a site waits until something listens there.
- A new lighthouse counts its quorums from one. Sites would look up one another's addresses under the number of a quorum of the old one and
  find those of connections that are closed; or take the quorum for the one that they are connected in, though one of them died. Here the
  number of a quorum depends on who is in it too, and its addresses are kept apart by the round.
"""

import socket
import zlib
from datetime import timedelta
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

ASKED = 600.0  # seconds after which a site asks again: what it said is lost where the lighthouse is killed after that
PAUSE = 0.1  # seconds between two looks for the lighthouse, at first


class Lasting:
    """torchft's client of a manager; a lighthouse may die before `_quorum`, or in it."""

    def __init__(self, client: Any, lighthouse: str):
        place = urlsplit(lighthouse)
        self.client, self.place = client, (place.hostname, place.port)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def _quorum(self, *, timeout: timedelta, **options: Any) -> Any:
        """Raises TimeoutError, RuntimeError."""
        ends = monotonic() + timeout.total_seconds()
        while True:
            self._await(ends)
            left = ends - monotonic()
            try:
                found = self.client._quorum(timeout=timedelta(seconds=max(1.0, min(ASKED, left))), **options)
                break
            except (TimeoutError, RuntimeError):
                if left <= ASKED:
                    raise
        found.quorum_id = zlib.crc32(f"{found.quorum_id} {sorted(found.replica_ids)}".encode())
        found.store_address = f"{found.store_address}/{found.max_step}"
        return found

    def _await(self, ends: float) -> None:
        """Until the lighthouse can be reached. Raises TimeoutError."""
        pause = PAUSE
        while True:
            try:
                socket.create_connection(self.place, timeout=10).close()
                return
            except OSError as error:
                if monotonic() + pause > ends:
                    raise TimeoutError(f"nothing listens at {self.place[0]}:{self.place[1]} ({error})") from error
            sleep(pause)
            pause = min(2 * pause, 5.0)
