"""A proxy between a client and a server, with the faults of networks.

It runs in a thread with an event loop of its own, so that neither a blocked loop of a test nor a
frozen client stops it. All methods may be called from any thread. They return when the fault is in
place, and block for as long as that takes: microseconds.

Faults hold for current and for later connections, until `heal`. A connection that lost bytes is
reset by `heal`: TCP never delivers a stream with a gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

Value = TypeVar("Value")

_CHUNK = 65536
_LAST_BYTES = 5.0  # seconds for a server to read the bytes before the end of its connection
_ABORT = struct.pack("ii", 1, 0)  # lingering, for no time: closing sends RST


class Way(enum.Enum):
    """The direction of bytes."""

    UP = "from the client to the server"
    DOWN = "from the server to the client"


class End(enum.Enum):
    """The end of a connection."""

    CUT = "FIN: in order"
    RESET = "RST: at once"


class _Trip(NamedTuple):
    """A limit of bytes: the connection that carries one more ends."""

    way: Way
    end: End


class Proxy:
    """A proxy that listens on a port of its own, and connects to `target`.

    Args:
        target: Host and port; it may be changed, for later connections.
        seed: Of the random choices of `sometimes`.

    Attributes:
        host: Always the loopback address.
        port: The port on which it listens.
        connections: The number of accepted connections.
        live: The number of open connections.
        refused: The number of connections that found no server.
        broken: The number of connections that a fault ended.
        passed: The number of delivered bytes, by direction.
    """

    host = "127.0.0.1"

    def __init__(self, target: tuple[str, int], *, seed: int = 0) -> None:
        self.target = target
        self.port = 0
        self.connections = self.refused = self.broken = 0
        self.passed = {Way.UP: 0, Way.DOWN: 0}
        self._chance = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="fault-proxy", daemon=True)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._pipes: set[_Pipe] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        # Current faults; read and written on the loop of the proxy only.
        self.delays = {Way.UP: 0.0, Way.DOWN: 0.0}
        self.swallows = {Way.UP: False, Way.DOWN: False}
        self.unreachable = False
        self.flow = asyncio.Event()
        self.flow.set()
        self.trip: _Trip | None = None
        self.trip_left = 0
        self.lose_after: bytes | None = None
        self.odds = {Way.UP: 0.0, Way.DOWN: 0.0}

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Reset all connections and stop listening. Idempotent."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ends at this moment
                self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        listener = await asyncio.start_server(self._accept, self.host, 0)
        self.port = listener.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        listener.close()
        self._end_all(End.RESET)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _call(self, function: Callable[[], Value]) -> Value:
        """Run a function on the loop of the proxy and return its value."""
        future: Future[Value] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return future.result()

    # --- state ----------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        return len(self._pipes)

    @property
    def armed(self) -> bool:
        """Return whether a fault of `break_after` or `lose_reply` has not happened yet."""
        return self.trip is not None or self.lose_after is not None

    # --- faults ---------------------------------------------------------------------------------

    def delay(self, *, up: float = 0.0, down: float = 0.0) -> None:
        """Deliver bytes that many seconds later."""
        self._call(lambda: self.delays.update({Way.UP: up, Way.DOWN: down}))

    def cut(self) -> None:
        """End all connections in order (FIN), and accept new ones."""
        self._call(lambda: self._end_all(End.CUT))

    def reset(self) -> None:
        """Reset all connections (RST), and accept new ones."""
        self._call(lambda: self._end_all(End.RESET))

    def refuse(self) -> None:
        """Reset all connections, and each new one at once."""

        def refuse() -> None:
            self.unreachable = True
            self._end_all(End.RESET)

        self._call(refuse)

    def black_hole(self) -> None:
        """Accept all bytes and drop them, in both directions."""
        self._call(lambda: self.swallows.update({Way.UP: True, Way.DOWN: True}))

    def half_open(self) -> None:
        """Deliver the bytes of clients, and drop those of the server."""
        self._call(lambda: self.swallows.update({Way.DOWN: True}))

    def hold(self) -> None:
        """Hold all bytes in both directions; `heal` delivers them, late and complete."""
        self._call(self.flow.clear)

    def break_after(self, count: int, way: Way, end: End = End.RESET) -> None:
        """End the connection that carries one byte more than `count` in a direction, once.

        Bytes count from now, over all connections. Exactly `count` of them are delivered.
        """

        def arm() -> None:
            self.trip, self.trip_left = _Trip(way, end), count

        self._call(arm)

    def lose_reply(self, request: bytes) -> None:
        """Deliver the next data with `request` in it, and reset the client instead of a reply.

        The server reads the whole request, and so carries it out.
        """

        def arm() -> None:
            self.lose_after = request

        self._call(arm)

    def sometimes(self, *, up: float = 0.0, down: float = 0.0) -> None:
        """Reset a connection at a random byte of a piece of data, with this probability."""
        self._call(lambda: self.odds.update({Way.UP: up, Way.DOWN: down}))

    def heal(self) -> None:
        """End all faults."""
        self._call(self._heal)

    def _heal(self) -> None:
        self.delays = dict.fromkeys(Way, 0.0)
        self.swallows = dict.fromkeys(Way, False)
        self.odds = dict.fromkeys(Way, 0.0)
        self.unreachable = False
        self.trip = self.lose_after = None
        self.flow.set()
        for pipe in list(self._pipes):
            if pipe.torn:
                pipe.end(End.RESET)

    def _end_all(self, how: End) -> None:
        for pipe in list(self._pipes):
            pipe.end(how)

    def fate(self, way: Way, data: bytes) -> tuple[bytes, End | None]:
        """Return the part of some data to deliver, and the end of the connection after it."""
        if self.trip is not None and self.trip.way is way:
            if len(data) > self.trip_left:
                keep, end = data[: self.trip_left], self.trip.end
                self.trip = None
                return keep, end
            self.trip_left -= len(data)
        if self.odds[way] and self._chance.random() < self.odds[way]:
            return data[: self._chance.randrange(len(data))], End.RESET
        return data, None

    # --- connections ----------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            with contextlib.suppress(asyncio.CancelledError):  # the proxy closes
                await self._pass(_Side(reader, writer))
        finally:
            self._tasks.discard(task)

    async def _pass(self, client: _Side) -> None:
        try:
            if self.unreachable:
                return
            if self.swallows[Way.UP]:
                await self._swallow(client)
                return
            server = await self._reach()
            if server is None:
                return
            try:
                await _Pipe(self, client, server).run(self._pipes)
            finally:
                server.end(End.RESET)
        finally:
            client.end(End.RESET)

    async def _reach(self) -> _Side | None:
        try:
            reader, writer = await asyncio.open_connection(*self.target)
        except OSError:
            self.refused += 1
            return None
        return _Side(reader, writer)

    async def _swallow(self, client: _Side) -> None:
        """Keep a connection without a server until it is reset."""
        pipe = _Pipe(self, client, client)
        pipe.torn = True
        self._pipes.add(pipe)
        try:
            while await client.read():
                pass
        finally:
            self._pipes.discard(pipe)


class _Side:
    """One of the two connections of a pipe."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        """Return the next bytes; none at the end of any kind."""
        try:
            return await self._reader.read(_CHUNK)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it is closed, which the other direction notices
            self._writer.write(data)
            await self._writer.drain()

    def finish(self) -> None:
        """Send the end of the stream."""
        with contextlib.suppress(OSError, RuntimeError):
            if self._writer.can_write_eof():
                self._writer.write_eof()

    def end(self, how: End) -> None:
        """Close it, in order or at once."""
        if how is End.CUT:
            self._writer.close()
            return
        with contextlib.suppress(OSError):
            sock: socket.socket = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self._writer.transport.abort()


class _Pipe:
    """The connection of one client, and the one to its server.

    Attributes:
        torn: Whether bytes were lost, so that it can only be reset.
    """

    def __init__(self, proxy: Proxy, client: _Side, server: _Side) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._lost = False  # the client is gone, and the bytes of the server do not matter
        self.torn = False

    async def run(self, pipes: set[_Pipe]) -> None:
        """Pass bytes on until both directions have ended."""
        pipes.add(self)
        ways = [
            asyncio.create_task(self._carry(Way.UP, self._client, self._server)),
            asyncio.create_task(self._carry(Way.DOWN, self._server, self._client)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            # A side that has read everything may still send.
            await asyncio.wait(ways, timeout=_LAST_BYTES)
        finally:
            pipes.discard(self)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def end(self, how: End) -> None:
        """End both connections now."""
        self._proxy.broken += 1
        self._client.end(how)
        self._server.end(how)

    async def _carry(self, way: Way, source: _Side, sink: _Side) -> None:
        proxy = self._proxy
        while data := await source.read():
            if proxy.delays[way]:
                await asyncio.sleep(proxy.delays[way])
            await proxy.flow.wait()
            if self._lost:
                continue
            if proxy.swallows[way]:
                self.torn = True
                continue
            wanted = proxy.lose_after
            if way is Way.UP and wanted is not None and wanted in data:
                proxy.lose_after = None
                await self._deliver(way, sink, data)
                self._lose(End.RESET)
                return
            keep, end = proxy.fate(way, data)
            await self._deliver(way, sink, keep)
            if end is not None:
                self._lose(end)
                return
        sink.finish()

    async def _deliver(self, way: Way, sink: _Side, data: bytes) -> None:
        self._proxy.passed[way] += len(data)
        if data:
            await sink.write(data)

    def _lose(self, how: End) -> None:
        """End the client's connection now, and the server's after the delivered bytes."""
        self._proxy.broken += 1
        self._lost = True
        self._client.end(how)
        self._server.finish()
