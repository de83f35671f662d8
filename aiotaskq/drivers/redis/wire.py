"""A live connection to the server that any number of tasks share.

redis-py makes the connection, with its names, passwords and certificates; from then on the bytes
go between the transport and hiredis without a task in between, which would cost each command
two more turns of the event loop.

Commands go out in the order in which they were given, and replies come back in that order. A task
that is cancelled while it waits leaves its place behind: its reply is read and dropped, so that no
other task ever gets it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import InvalidResponse, RedisError
from redis.exceptions import TimeoutError as Silent

_NOTHING: Any = object()  # there is no whole reply yet


class Wire(asyncio.Protocol):
    """It belongs to the event loop that made it, and dies once.

    Args:
        connection: It is connected, and nothing is under way.

    Attributes:
        error: Why it is dead; None while it lives.
        closed: Done when the connection is closed.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._held_up: list[bytes] = []  # while the transport takes no more
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        parser: Any = connection._parser
        self._replies = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=parser.parse_error,
            notEnoughData=_NOTHING,
        )
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self.error: Exception | None = None
        self.closed = self._loop.create_task(self._close_when_failed())
        writer = connection._writer
        assert writer is not None  # it is connected
        self._transport = writer.transport
        self._transport.set_protocol(self)

    def send(self, packed: bytes, patience: float) -> asyncio.Future[Any]:
        """Send a command; return the future of its reply, which may be an exception as a value.

        Replies are values so that those whose tasks were cancelled go unnoticed.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        if self.error is not None:
            future.set_result(self.error)
            return future
        until = self._loop.time() + patience
        self._pending.append((until, future))
        if self._paused:
            self._held_up.append(packed)
        else:
            self._transport.write(packed)
        if self._timer is None:
            self._timer = self._loop.call_at(until, self._check)
        return future

    def fail(self, error: Exception) -> None:
        """Give the connection up."""
        if self.error is not None:
            return
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
        while self._pending:
            _, future = self._pending.popleft()
            if not future.done():
                future.set_result(error)
        self._held_up.clear()
        if not self._failed.done():
            self._failed.set_result(None)

    async def close(self) -> None:
        """Give the connection up and wait until it is closed."""
        self.fail(Disconnected("the connection was closed"))
        await asyncio.wait([self.closed])

    def _check(self) -> None:
        """Fail if the oldest command waits too long; replies come in order, so it is the first."""
        self._timer = None
        if not self._pending:
            return
        until, _ = self._pending[0]
        if until <= self._loop.time():
            self.fail(Silent("no answer in time"))
        else:
            self._timer = self._loop.call_at(until, self._check)

    async def _close_when_failed(self) -> None:
        try:
            await self._failed
        finally:
            self.fail(Disconnected("the connection was closed"))  # if it was cancelled
            await self._connection.disconnect(nowait=True)

    # What the transport calls

    def data_received(self, data: bytes) -> None:
        self._replies.feed(data)
        while self.error is None:
            try:
                reply = self._replies.gets()
            except RedisError as error:  # no RESP at all
                self.fail(error)
                return
            if reply is _NOTHING:
                return
            if isinstance(reply, Disconnected):  # such as a server that is still loading
                self.fail(reply)
            elif not self._pending:
                self.fail(Disconnected("an answer that nobody asked for"))
            else:
                _, future = self._pending.popleft()
                if not future.done():
                    future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or Disconnected("the server closed the connection"))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._held_up:
            packed, self._held_up = b"".join(self._held_up), []
            self._transport.write(packed)
