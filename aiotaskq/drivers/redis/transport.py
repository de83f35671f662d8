"""The bytes of one live connection to a Redis server, shared by any number of tasks.

redis-py makes the connection, with its names, passwords and certificates. From then on the bytes go
directly between asyncio's transport and hiredis. A task in between, such as redis-py's own reader,
would cost each command two more turns of the event loop.

Theory of operation
-------------------

A transport is live, then failed, then closed; it never goes back. It fails once, for the first of
these reasons: the server closes the connection, a command is not answered in time, bytes
arrive that are not RESP, or `fail` is called. `error` is that reason.

Redis answers the commands of a connection in the order in which they were sent. So `_pending` is a
queue of futures: a command appends one, a reply takes the first. This is all that connects a reply
with its command, and therefore:

* A task that is cancelled while it waits leaves its future in the queue. The reply is read and
  dropped, and no other task ever gets it.
* The deadline of the first future is the only one that matters. One timer serves all commands.
* After any doubt about the order (a late reply, one that nobody asked for) the whole transport
  fails.

When it fails, each pending future gets the error as its value. Whether a command that was sent took
effect is unknown then. Nothing here is sent twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import InvalidResponse, RedisError
from redis.exceptions import TimeoutError as RedisTimeout

from aiotaskq import forks

_NOTHING: Any = object()  # there is no complete reply yet


class RedisTransport(asyncio.Protocol):
    """Sends commands and reads replies until it fails; it belongs to one event loop.

    Args:
        connection: Connected, with no command under way.

    Attributes:
        error: Why it failed; None while it is live.
        closed: Done when the connection is closed.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._unwritten: list[bytes] = []  # while asyncio's transport takes no more
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
        self._heard_at = self._loop.time()
        self.closed = self._loop.create_task(self._close_when_failed())
        writer = connection._writer
        assert writer is not None  # it is connected
        forks.keep_transport_private(writer.transport)
        self._transport = writer.transport
        self._transport.set_protocol(self)

    @property
    def quiet_for(self) -> float:
        """Seconds since the last byte from the server; 0 while it owes an answer."""
        return 0.0 if self._pending else self._loop.time() - self._heard_at

    def send(self, packed: bytes, timeout: float) -> asyncio.Future[Any]:
        """Send a command; return the future of its reply, or of an exception as a value.

        An exception is a value, so that asyncio does not complain about the futures of cancelled
        tasks, which nobody reads.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        if self.error is not None:
            future.set_result(self.error)
            return future
        until = self._loop.time() + timeout
        self._pending.append((until, future))
        if self._paused:
            self._unwritten.append(packed)
        else:
            self._transport.write(packed)
        if self._timer is None:
            self._timer = self._loop.call_at(until, self._check_deadline)
        elif len(self._pending) == 1 and self._timer.when() > until:
            # It was set for an earlier command, which had more time.
            self._timer.cancel()
            self._timer = self._loop.call_at(until, self._check_deadline)
        return future

    def fail(self, error: Exception) -> None:
        """Give the connection up; only the first call has an effect."""
        if self.error is not None:
            return
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
        while self._pending:
            _, future = self._pending.popleft()
            if not future.done():
                future.set_result(error)
        self._unwritten.clear()
        if not self._failed.done():
            self._failed.set_result(None)

    async def close(self) -> None:
        """Give the connection up and wait until it is closed."""
        self.fail(Disconnected("the connection was closed"))
        await asyncio.wait([self.closed])

    def _check_deadline(self) -> None:
        """Fail if the first command waits too long; replies come in order."""
        self._timer = None
        if not self._pending:
            return
        until, _ = self._pending[0]
        if until <= self._loop.time():
            self.fail(RedisTimeout("no answer in time"))
        else:
            self._timer = self._loop.call_at(until, self._check_deadline)

    async def _close_when_failed(self) -> None:
        try:
            await self._failed
        finally:
            self.fail(Disconnected("the connection was closed"))  # where this task was cancelled
            await self._connection.disconnect(nowait=True)

    # --- called by asyncio's transport ----------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._replies.feed(data)
        while self.error is None:
            try:
                reply = self._replies.gets()
            except RedisError as error:  # not RESP
                self.fail(error)
                return
            if reply is _NOTHING:
                return
            if isinstance(reply, Disconnected):  # such as that of a server that is still loading
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
        if self._unwritten:
            packed, self._unwritten = b"".join(self._unwritten), []
            self._transport.write(packed)
