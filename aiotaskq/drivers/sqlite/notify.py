"""Notification between the processes that share a file: UDP datagrams to the local machine.

SQLite does not tell a process that another one has committed something. So the processes tell one
another, by datagrams on the loopback device. A datagram holds a secret that stands in the file, and
means "look again". Datagrams of programs that cannot read the file have no effect.

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
- A datagram of an earlier release is empty, and is not heeded: looks find what it told of.
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
import hmac
import itertools
import socket
import time
import weakref
from collections.abc import Collection, Iterable
from typing import ClassVar, Protocol

from aiotaskq import forks
from aiotaskq.drivers.sqlite.process_identity import this_network
from aiotaskq.errors import ConfigError, Unavailable

RESULTS = "results"
"""The topic of final outcomes."""

_LOOPBACK = "127.0.0.1"
_LONGEST = 100  # bytes of a datagram that are read
_MOST_PORTS = 1000  # listeners that one change wakes; the others look by themselves
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

    def notify(self, ports: Iterable[int], secret: bytes) -> None:
        """Wake the listeners at these ports. Never raises."""
        for port in itertools.islice(ports, _MOST_PORTS):
            # The change is committed, and a listener that is not reached finds it by a look.
            with contextlib.suppress(OSError, OverflowError):
                self._sender().sendto(secret, (_LOOPBACK, port))

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


class WakeUpPorts(Protocol):
    """The table of wake-ups of one file, as a listener needs it."""

    @property
    def generation(self) -> int:
        """Return another number when the path leads to another file."""
        ...

    async def write_port(self, port: int, topics: Collection[str]) -> bytes:
        """Write a port for some topics; return the secret that its datagrams hold.

        Raises:
            Unavailable: It cannot be written now.
        """
        ...

    async def erase_port(self, port: int) -> None:
        """Delete the rows of a port.

        Raises:
            Unavailable: They cannot be deleted now.
        """
        ...


class SQLiteListener:
    """Receives datagrams for all waiters of one driver object, on its event loop.

    States: closed, open without a port, open with a port, open and without any hope of one. A port
    is bound by the first `listen`.

    Args:
        ports: Keeps the table of wake-ups.
    """

    poll = 1.0
    """Seconds after which a waiter looks again without a notification."""

    poll_without_port = 0.1
    """The same where no port can be bound."""

    def __init__(
        self,
        ports: WakeUpPorts,
    ) -> None:
        self._ports = ports
        self._secret = b""
        self._generation = 0  # of the file in which the port was written
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
                self._secret = await self._ports.write_port(port, wanted)
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
                await self._ports.erase_port(port)

    def _wake_all(self) -> None:
        for waiter in self._waiters:
            waiter.set()

    def _unwritten(self, topics: Collection[str]) -> list[str]:
        """Return the topics whose row is missing, or is to be written anew."""
        if self._generation != self._ports.generation:  # it is another file
            self._generation = self._ports.generation
            self._written_at.clear()
        before = time.monotonic() - SQLiteNotifier.stale_after / 3
        return [topic for topic in topics if self._written_at.get(topic, before) <= before]

    def _bind(self) -> None:
        # Without `create_datagram_endpoint`: one step, so that a cancelled call leaves nothing.
        if self._socket is not None:
            return
        try:
            self._socket = bind_port()
            # Where the event loop is closed without `close`, nobody else does it. Not at exit: it
            # would come before the `close` of the loop behind plain code.
            weakref.finalize(self, self._socket.close).atexit = False
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
                if hmac.compare_digest(bound.recv(_LONGEST), self._secret):
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
