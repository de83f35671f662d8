"""The Redis result backend: a readable key for each outcome, a channel for the final ones."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Self

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import RedisError

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.redis.address import parse
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.link import Link
from aiotaskq.drivers.redis.outcomes import Outcomes
from aiotaskq.errors import BackendUnavailable

logger = logging.getLogger("aiotaskq.redis")

_SILENCE = 5.0  # seconds until a subscriber asks whether the server is there, and then waits
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between attempts to subscribe

_decode_news = msgspec.json.Decoder(list[str | Outcome]).decode


class RedisBackend:
    """Outcomes as strings of JSON.

    Args:
        url: As of `RedisBroker`.
        prefix: What all keys begin with.

    Raises:
        ConfigError: The URL is none that there is.
    """

    wants_arguments: ClassVar[bool] = False

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._address = parse(url)
        self._keys = Keys(prefix)
        self._link: Link | None = None
        self._outcomes: Outcomes | None = None

    @property
    def url(self) -> str:
        return self._address.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._keys.given)

    async def open(self) -> None:
        if self._link is not None:
            return
        link = Link(self._address, BackendUnavailable)
        try:
            await link.open()
        except BaseException:
            await link.close()
            raise
        if self._link is None:
            self._link, self._outcomes = link, Outcomes(link, self._keys)
        else:  # two tasks opened it at once
            await link.close()

    async def close(self) -> None:
        link, self._link, self._outcomes = self._link, None, None
        if link is not None:
            await link.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        return await self._opened().store(batch, ttl)

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        return await self._opened().load(ids)

    def subscribe(self) -> AsyncGenerator[Sequence[str | Outcome], None]:
        return arrivals(self._address.connect, self._keys.results, self.url)

    async def forget(self, ids: Collection[str]) -> int:
        return await self._opened().forget(ids)

    def _opened(self) -> Outcomes:
        if self._outcomes is None:
            raise BackendUnavailable(f"{self._address.url}: the result backend is not open")
        return self._outcomes


async def arrivals(
    connect: Callable[[], Awaitable[AbstractConnection]], channel: str, url: str
) -> AsyncGenerator[Sequence[str | Outcome], None]:
    """Yield what is told on a channel, as `ResultBackend.subscribe` does.

    Args:
        connect: Returns a connection of its own.
        channel: Its name.
        url: Where it is, for logs.
    """
    failures = 0
    while True:
        try:
            async with _subscription(connect, channel) as connection:
                failures = 0
                yield []
                while True:
                    if news := await _listen(connection):
                        yield news
        except (RedisError, OSError) as error:
            if failures == 0:
                logger.warning(
                    "The subscription to results was lost; it is tried again",
                    extra={"event": "redis_subscription_lost", "url": url, "error": str(error)},
                )
            failures += 1
        longest = min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2.0 ** min(failures, 10))
        await asyncio.sleep(random.uniform(_SHORTEST_PAUSE, longest))


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


async def _listen(connection: AbstractConnection) -> list[str | Outcome]:
    """Return what the next message tells; nothing if it is not about outcomes."""
    reply = await connection.read_response(timeout=_SILENCE)
    if reply is None:
        # An answer, or an outcome meanwhile, shows that the connection is not half open.
        await connection.send_command("PING")
        reply = await connection.read_response(timeout=_SILENCE)
    if reply is None:
        raise Disconnected("the subscription went silent")
    if reply[0] != b"message":
        return []
    try:
        return _decode_news(reply[2])
    except msgspec.MsgspecError:
        return []  # not of our making
