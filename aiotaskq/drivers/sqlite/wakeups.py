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


def queue_topic(queue: str) -> str:
    """Return the topic of a queue's messages."""
    return f"queue:{queue}"


class Bell(asyncio.DatagramProtocol):
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
        self._port: int | None = None
        self._open = False
        self._deaf = False
        self._transport: asyncio.DatagramTransport | None = None
        self._lost: asyncio.Future[None] | None = None

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
            if self._transport is None:
                await self._bind()
            wanted = self._to_write(topics)
            if wanted and self._port is not None:
                now = time.monotonic()
                await self._link.run(partial(_write, port=self._port, topics=wanted))
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
            port, transport = self._port, self._transport
            self._open, self._port, self._transport = False, None, None
            self._written.clear()
            self.ring()
            if port is not None and self._link.is_open:
                # Left behind, the row is stale in a minute.
                with contextlib.suppress(Unavailable):
                    await self._link.run(partial(_erase, port=port))
            if transport is not None and self._lost is not None:
                transport.close()
                await asyncio.shield(self._lost)

    def datagram_received(self, data: bytes, addr: object) -> None:
        """Called by the event loop."""
        self.ring()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop, last of all."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    def _to_write(self, topics: Collection[str]) -> list[str]:
        before = time.monotonic() - _REFRESH
        return [topic for topic in topics if self._written.get(topic, before) <= before]

    async def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        self._lost = loop.create_future()
        try:
            self._transport, _ = await loop.create_datagram_endpoint(
                lambda: self, local_addr=(LOOPBACK, 0)
            )
        except OSError:
            self._deaf = True  # a sandbox without network, say: polling faster is what is left
            return
        self._port = self._transport.get_extra_info("sockname")[1]


def _write(database: Database, port: int, topics: Collection[str]) -> None:
    network, process, now = this_network(), this_process(), time.time()
    with database.write(relaxed=True):
        for topic in topics:
            database.change(sql.LISTEN, (topic, network, port, now, process))


def _erase(database: Database, port: int) -> None:
    with database.write(relaxed=True):
        database.change(sql.UNLISTEN, (this_network(), port))
