"""Notifications from a Redis server: tokens that wake idle consumers, and outcomes on a channel.

Theory of operation
-------------------

*Tokens.* A consumer that finds nothing waits with a blocking pop on the lists ``wake`` of its
queues. Scripts that add items push a token there, one at most for a queue. A token says "look
again" and carries no item. So a token that is lost costs time and no message: each consumer looks
again after `LONGEST_WAIT`. A token that is taken in vain must not hide items from the other
consumers. Either the next fetch of its taker takes these items, or that fetch leaves a new token.

The blocking pop has a connection of its own, because it would hold up all commands behind it.
When the waiting task is cancelled, the connection is dropped: the server would otherwise hand the
next token to a consumer that does not wait.

Redis ends a wait at its timeout only when it next looks at its timers, up to a tenth of a second
late. Where an item falls due earlier than that, the consumer waits on its own list
``nudge:<consumer>`` as well, and pushes a token there when the time has come.

*Outcomes.* A subscription is a connection of its own, and yields the outcomes published on one
channel. It may break at any time, also without a sign: the other side of a half-open connection
sends nothing. So after some seconds of silence a PING has to be answered. After each break it
subscribes anew and yields an empty item, which says that outcomes may have been missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import RedisError

from aiotaskq.backoff import Backoff
from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.redis import scripts
from aiotaskq.drivers.redis.client import RedisClient
from aiotaskq.drivers.redis.connection import RedisConnection, Word
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.redis")

LONGEST_WAIT = 0.9  # seconds for a token: so long may an item wait whose token was lost
SHORTEST_WAIT = 0.005  # seconds: for less than that the server is not asked for a token
MARGIN = 3.0  # seconds that the reply to a blocking command may be late

_SILENCE = 5.0  # seconds until a subscriber sends a PING, and then for the answer
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts to subscribe

_decode_outcomes = msgspec.json.Decoder(list[str | Outcome]).decode


class RedisNotifier:
    """The waiting of one consumer for tokens.

    Args:
        client: The client of the broker.
        bases: The bases of the consumer's queues.
        consumer: The id of the consumer.
    """

    def __init__(self, client: RedisClient, bases: Sequence[str], consumer: str) -> None:
        self._client = client
        self._own_list = f"{bases[0]}nudge:{consumer}"
        self._lists = [*(f"{base}wake" for base in bases), self._own_list]
        self._connection: RedisConnection | None = None

    async def wait(self, seconds: float) -> bool:
        """Wait for a token of a queue, or for `wake`; the server may end the wait late.

        Returns:
            Whether there was a token of a queue.
        """
        if self._connection is None:
            self._connection = self._client.new_connection()
        connection = self._connection
        words: list[Word] = ["BLPOP", *self._lists]
        try:
            # 0 would mean "for ever".
            timeout = f"{max(seconds, 0.001):.3f}"
            reply = await connection.command(*words, timeout, timeout=seconds + MARGIN)
        except asyncio.CancelledError:
            connection.drop()  # or the next token would go to a task that waits no more
            raise
        return reply is not None and reply[0] != self._own_list.encode()

    async def wait_exactly(self, seconds: float) -> None:
        """Wait for a token of a queue, but no longer than so many seconds."""
        if seconds < SHORTEST_WAIT:
            await asyncio.sleep(seconds)
            return
        waiting = asyncio.create_task(self.wait(seconds + MARGIN))
        try:
            await asyncio.wait([waiting], timeout=seconds)
            if not waiting.done():
                await self.wake()
            await waiting
        finally:
            waiting.cancel()
            # `wake` may have failed first, and its error is raised. That of `waiting` has to be
            # retrieved all the same, or asyncio logs it as one that nobody has seen.
            await asyncio.gather(waiting, return_exceptions=True)

    async def wake(self) -> None:
        """End the wait of this consumer now."""
        await self._client.connection.script(scripts.WAKE, [self._own_list], [])

    async def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


async def subscribe_to_outcomes(
    connect: Callable[[], Awaitable[AbstractConnection]], channel: str, url: str
) -> AsyncGenerator[Sequence[str | Outcome], None]:
    """Yield the outcomes published on a channel, as `ResultBackend.subscribe` does.

    Args:
        connect: Returns a new connection.
        channel: The name of the channel.
        url: The URL to show in logs.
    """
    backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
    while True:
        try:
            async with _subscription(connect, channel) as connection:
                backoff.reset()
                yield []
                while True:
                    if outcomes := await _next_outcomes(connection):
                        yield outcomes
        except (RedisError, OSError) as error:
            if backoff.failures == 0:
                logger.warning(
                    "The subscription to results was lost; it is tried again",
                    extra={"event": "redis_subscription_lost", "url": url, "error": str(error)},
                )
        await asyncio.sleep(backoff.next())


@asynccontextmanager
async def _subscription(
    connect: Callable[[], Awaitable[AbstractConnection]], channel: str
) -> AsyncGenerator[AbstractConnection, None]:
    connection = await connect()
    try:
        await connection.send_command("SUBSCRIBE", channel)
        reply = await connection.read_response(timeout=_SILENCE)
        if not reply or reply[0] != b"subscribe":
            raise Disconnected("no answer to SUBSCRIBE")
        yield connection
    finally:
        await connection.disconnect(nowait=True)


async def _next_outcomes(connection: AbstractConnection) -> list[str | Outcome]:
    """Return the outcomes of the next message; none if it is of another kind."""
    reply = await connection.read_response(timeout=_SILENCE)
    if reply is None:
        # The answer, or an outcome meanwhile, shows that the connection is not half open.
        await connection.send_command("PING")
        reply = await connection.read_response(timeout=_SILENCE)
    if reply is None:
        raise Disconnected("the subscription went silent")
    if reply[0] != b"message":
        return []
    try:
        return _decode_outcomes(reply[2])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return []  # published by another program
