"""The sending half of the wake-ups; `wakeups` has the other half and the whole story."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterable
from typing import ClassVar

from aiotaskq.drivers.sqlite.process import this_network

LOOPBACK = "127.0.0.1"


class Caller:
    """Sends empty datagrams to ports of this machine, from whatever thread owns it."""

    stale_after: ClassVar[float] = 60.0
    """Seconds after which a port that was not written down again belongs to nobody."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    @functools.cached_property
    def network(self) -> str:
        """The network whose ports can be called from here."""
        return this_network()

    def call(self, ports: Iterable[int]) -> None:
        """Wake who listens on these ports, if anybody does."""
        for port in ports:
            # Whatever goes wrong, the change itself is committed, and who is not reached looks
            # for it within a second anyway.
            with contextlib.suppress(OSError):
                self._sender().sendto(b"", (LOOPBACK, port))

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _sender(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        return self._socket
