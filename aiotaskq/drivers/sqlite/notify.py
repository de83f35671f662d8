"""Notification between the processes that share a file: empty UDP datagrams to the local machine.

SQLite does not tell a process that another one has committed something. So the processes tell one
another, by datagrams on the loopback device. A datagram is empty and means "look again".

Theory of operation. A *listener* (one for each driver object) binds a UDP port and writes it into
the table ``<prefix>_wakeups``, once for each topic: ``queue:<name>`` or ``results``. A transaction
that changes a topic reads the ports of this topic before it commits, and its process sends a
datagram to each of them after the commit (`SQLiteDatabase.write`).

*Invariant: every change is either found or notified.* A waiter takes its steps in this order:
clear its event, have the port written (`SQLiteListener.listen`), look into the tables, wait for
the event. Transactions that write come one after the other. So a change that commits before the
port is written is found by the look, and one that commits later has read the port.

Events that may come between any two steps:

- A datagram is lost, because its sender died after the commit, or a buffer was full. Each waiter
  looks every `SQLiteListener.poll` seconds in any case.
- A datagram comes in vain: to a port that somebody else owns by now, or for a message that another
  worker has taken. Its only effect is a look.
- A listener dies. Its rows stay until maintenance sees that its process is gone, or until they
  are `SQLiteNotifier.stale_after` seconds old. A listener that lives writes them anew three times
  in that period.
- A driver object is closed: the port is closed first, then its rows are deleted. Without the
  delete (a locked file), the rows become stale.
- No port can be bound (a sandbox without network, an event loop without readers): the listener
  gives up on datagrams, and its waiters look every `SQLiteListener.poll_without_port` seconds.
- Processes in different containers share the file, but not the loopback device. Rows name the
  network of their port, senders use only those of their own network, and looks do the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import ClassVar

from aiotaskq import forks
from aiotaskq.drivers.sqlite.process_identity import this_network
from aiotaskq.errors import ConfigError, Unavailable

RESULTS = "results"
"""The topic of final outcomes."""

_LOOPBACK = "127.0.0.1"
_READ_AT_ONCE = 100  # datagrams that are read before the event loop goes on with other work


def queue_topic(queue: str) -> str:
    """Return the topic of a queue's messages."""
    return f"queue:{queue}"


class SQLiteNotifier:
    """Sends datagrams to ports of this machine, from the thread that owns it."""

    stale_after: ClassVar[float] = 60.0
    """Seconds after which a port that was not written anew counts as abandoned."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    @functools.cached_property
    def network(self) -> str:
        """The network whose ports can be reached from here."""
        return this_network()

    def notify(self, ports: Iterable[int]) -> None:
        """Wake the listeners at these ports. Never raises."""
        for port in ports:
            # The change is committed, and a listener that is not reached finds it by a look.
            with contextlib.suppress(OSError):
                self._sender().sendto(b"", (_LOOPBACK, port))

    def close(self) -> None:
        """Close the socket. The next `notify` opens another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _sender(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        return self._socket


class SQLiteListener:
    """Receives datagrams for all waiters of one driver object, on its event loop.

    States: closed, open without a port, open with a port, open and without any hope of one. A port
    is bound by the first `listen`.

    Args:
        write_port: Writes a port into the table of wake-ups, for some topics; may raise
            `Unavailable`.
        erase_port: Deletes the rows of a port; may raise `Unavailable`.
    """

    poll = 1.0
    """Seconds after which a waiter looks again without a notification."""

    poll_without_port = 0.1
    """The same where no port can be bound."""

    def __init__(
        self,
        write_port: Callable[[int, Collection[str]], Awaitable[None]],
        erase_port: Callable[[int], Awaitable[None]],
    ) -> None:
        self._write_port = write_port
        self._erase_port = erase_port
        self._lock = asyncio.Lock()
        self._waiters: set[asyncio.Event] = set()
        self._written_at: dict[str, float] = {}  # by topic, on the monotonic clock
        self._is_open = False
        self._has_no_port = False
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Allow `listen` to bind a port. Idempotent."""
        self._is_open = True

    def add(self, waiter: asyncio.Event) -> None:
        """Set this event from now on whenever there is a reason to look."""
        self._waiters.add(waiter)

    def discard(self, waiter: asyncio.Event) -> None:
        """No longer set this event."""
        self._waiters.discard(waiter)

    async def listen(self, topics: Collection[str]) -> None:
        """Ensure that every change of these topics that commits from now on is notified.

        Raises:
            Unavailable: The port cannot be written into the table now.
        """
        if self._has_no_port or not self._unwritten(topics):
            return
        async with self._lock:
            if not self._is_open:
                return  # closed in the meantime; the caller notices that by itself
            self._bind()
            wanted = self._unwritten(topics)
            if wanted and self._socket is not None:
                # The time before the call: the row must not be older than it seems to be here.
                now, port = time.monotonic(), self._socket.getsockname()[1]
                await self._write_port(port, wanted)
                self._written_at.update(dict.fromkeys(wanted, now))

    async def wait(self, waiter: asyncio.Event, seconds: float) -> None:
        """Wait until the event is set, or until it is time for a look."""
        at_most = min(seconds, self.poll_without_port if self._has_no_port else self.poll)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await waiter.wait()

    async def close(self) -> None:
        """Wake all waiters and give up the port. Idempotent, never raises."""
        async with self._lock:
            self._is_open = False
            self._written_at.clear()
            self._wake_all()
            bound, self._socket = self._socket, None
            if bound is None:
                return
            port = bound.getsockname()[1]
            asyncio.get_running_loop().remove_reader(bound)
            bound.close()
            # Otherwise the rows become stale; after a fork they are the parent's anyway.
            with contextlib.suppress(Unavailable, ConfigError):
                await self._erase_port(port)

    def _wake_all(self) -> None:
        for waiter in self._waiters:
            waiter.set()

    def _unwritten(self, topics: Collection[str]) -> list[str]:
        """Return the topics whose row is missing, or is to be written anew."""
        before = time.monotonic() - SQLiteNotifier.stale_after / 3
        return [topic for topic in topics if self._written_at.get(topic, before) <= before]

    def _bind(self) -> None:
        # Without `create_datagram_endpoint`: one step, so that a cancelled call leaves nothing.
        if self._socket is not None:
            return
        try:
            self._socket = bind_port()
            asyncio.get_running_loop().add_reader(self._socket, self._receive, self._socket)
        except (OSError, NotImplementedError):
            # A sandbox without network, or an event loop without readers.
            self._has_no_port = True
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _receive(self, bound: socket.socket) -> None:
        with contextlib.suppress(OSError):  # nothing more to read
            for _ in range(_READ_AT_ONCE):
                bound.recv(1)
        self._wake_all()


def bind_port() -> socket.socket:
    """Return a socket with a port on the loopback device.

    Raises:
        OSError: No port can be bound.
    """
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        bound.setblocking(False)
        bound.bind((_LOOPBACK, 0))
        forks.keep_private(bound.fileno())
    except OSError:
        bound.close()
        raise
    return bound
