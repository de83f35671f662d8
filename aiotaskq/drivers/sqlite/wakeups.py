"""How processes wake one another: an empty UDP datagram on the loopback device.

Who waits binds a port and writes it into the table of wake-ups, by topic: ``queue:<name>`` or
``results``. Who changes something reads the ports in the same transaction, and calls them when
it is committed. A waiter looks into the tables after its port is written and before it sleeps,
so a change is either seen or called. The call says nothing but "look again": it may be lost, or
be in vain, and a slow poll covers what it cannot reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Collection
from functools import partial

from aiotaskq.drivers.sqlite import sql
from aiotaskq.drivers.sqlite.caller import LOOPBACK, Caller
from aiotaskq.drivers.sqlite.database import Database
from aiotaskq.drivers.sqlite.link import Link
from aiotaskq.drivers.sqlite.process import this_network, this_process
from aiotaskq.errors import Unavailable

RESULTS = "results"
"""The topic of final outcomes."""

_REFRESH = Caller.stale_after / 3
_AT_ONCE = 100  # datagrams that are read before others get their turn on the event loop


def queue_topic(queue: str) -> str:
    """Return the topic of a queue's messages."""
    return f"queue:{queue}"


class Bell:
    """The receiving half, one for each driver object, however many wait at it."""

    poll = 1.0
    """Seconds after which a waiter looks again, unasked."""

    poll_deaf = 0.1
    """The same where no port can be had."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = asyncio.Lock()
        self._ears: set[asyncio.Event] = set()
        self._written: dict[str, float] = {}  # topic: when, on the monotonic clock
        self._open = False
        self._deaf = False
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Let `listen` take a port when it needs one. Idempotent."""
        self._open = True

    def add(self, ear: asyncio.Event) -> None:
        """Set this event from now on whenever there is reason to look again."""
        self._ears.add(ear)

    def discard(self, ear: asyncio.Event) -> None:
        """Set it no more."""
        self._ears.discard(ear)

    async def listen(self, topics: Collection[str]) -> None:
        """See to it that a change of these topics, committed from now on, rings.

        Raises:
            Unavailable: The port cannot be written down now.
        """
        if self._deaf or not self._to_write(topics):
            return
        async with self._lock:
            if not self._open:
                return  # closed in the meantime; the caller is about to notice
            self._take_port()
            wanted = self._to_write(topics)
            if wanted and self._socket is not None:
                now, port = time.monotonic(), self._socket.getsockname()[1]
                await self._link.run(partial(_write, port=port, topics=wanted))
                self._written.update(dict.fromkeys(wanted, now))

    async def wait(self, ear: asyncio.Event, seconds: float) -> None:
        """Wait until the ear hears something, or it is time to look anyway."""
        at_most = min(seconds, self.poll_deaf if self._deaf else self.poll)
        with contextlib.suppress(TimeoutError):  # then it is time
            async with asyncio.timeout(at_most):
                await ear.wait()

    def ring(self) -> None:
        """Have everybody who waits here look again."""
        for ear in self._ears:
            ear.set()

    async def close(self) -> None:
        """Give up the port. Idempotent, never raises."""
        async with self._lock:
            self._open = False
            self._written.clear()
            self.ring()
            ours, self._socket = self._socket, None
            if ours is None:
                return
            port = ours.getsockname()[1]
            asyncio.get_running_loop().remove_reader(ours)
            ours.close()
            if self._link.is_open:
                # Left behind, the row is stale in a minute.
                with contextlib.suppress(Unavailable):
                    await self._link.run(partial(_erase, port=port))

    def _to_write(self, topics: Collection[str]) -> list[str]:
        before = time.monotonic() - _REFRESH
        return [topic for topic in topics if self._written.get(topic, before) <= before]

    def _take_port(self) -> None:
        # Without `create_datagram_endpoint`: one step, so that cancelling leaves nothing behind.
        if self._socket is not None:
            return
        try:
            self._socket = bind()
            asyncio.get_running_loop().add_reader(self._socket, self._hear, self._socket)
        except (OSError, NotImplementedError):
            # A sandbox without network, or a loop without readers. What is left is to look often.
            self._deaf = True
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _hear(self, ours: socket.socket) -> None:
        with contextlib.suppress(OSError):  # nothing more to read
            for _ in range(_AT_ONCE):
                ours.recv(1)
        self.ring()


def bind() -> socket.socket:
    """Return a socket with a port on the loopback device.

    Raises:
        OSError: There is none to be had.
    """
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        made.setblocking(False)
        made.bind((LOOPBACK, 0))
    except OSError:
        made.close()
        raise
    return made


def _write(database: Database, port: int, topics: Collection[str]) -> None:
    network, process, now = this_network(), this_process(), time.time()
    with database.write(relaxed=True):
        for topic in topics:
            database.change(sql.LISTEN, (topic, network, port, now, process))


def _erase(database: Database, port: int) -> None:
    with database.write(relaxed=True):
        database.change(sql.UNLISTEN, (this_network(), port))
