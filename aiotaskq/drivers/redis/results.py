"""The Redis result backend: a readable key for each outcome, a channel for the final ones.

A final outcome is `<prefix>:result:<id>`, written once. One that is not final is
`<prefix>:state:<id>`, and goes when a final one comes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Self

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import RedisError

from aiotaskq.drivers.redis import scripts
from aiotaskq.drivers.redis.address import parse
from aiotaskq.drivers.redis.client import portions
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.link import Link, Word, connect
from aiotaskq.errors import BackendUnavailable, DecodeError
from aiotaskq.message import Outcome

logger = logging.getLogger("aiotaskq.redis")

_TOLD = 8  # outcomes that go to the subscribers whole, if they are as few: nothing else is to do
_TOLD_BYTES = 4096  # then, and they take no more than this
_LOADED = 500  # outcomes in one command
_SILENCE = 5.0  # seconds until a subscriber asks whether the server is there, and then waits
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between attempts to subscribe

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Outcome).decode
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
        self._unsure: set[str] = set()  # ids whose outcomes were sent, and may have been stored

    @property
    def url(self) -> str:
        return self._address.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._keys.prefix)

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
            self._link = link
        else:  # two tasks opened it at once
            await link.close()

    async def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        refused: list[str] = []
        encoded = ((outcome, _encode(outcome)) for outcome in batch)
        try:
            for part in portions((len(text), (outcome, text)) for outcome, text in encoded):
                refused += await self._store(part, ttl)
        except BaseException:
            self._unsure.update(outcome.task_id for outcome in batch)
            raise
        if self._unsure:
            refused = await self._strange(batch, refused)
        return refused

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        found: dict[str, Outcome] = {}
        wanted = list(ids)
        for start in range(0, len(wanted), _LOADED):
            part = wanted[start : start + _LOADED]
            keys = [key for task_id in part for key in self._pair(task_id)]
            texts = await self._opened().command("MGET", *keys)
            for task_id, result, state in zip(part, texts[::2], texts[1::2], strict=True):
                text = state if result is None else result
                if text is not None:
                    found[task_id] = self._read(task_id, text)
        return found

    async def arrivals(self) -> AsyncGenerator[Sequence[str | Outcome], None]:
        failures = 0
        while True:
            try:
                async with self._subscription() as connection:
                    failures = 0
                    yield []
                    while True:
                        if news := await self._listen(connection):
                            yield news
            except (RedisError, OSError) as error:
                self._complain(error, failures)
                failures += 1
            longest = min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2.0 ** min(failures, 10))
            await asyncio.sleep(random.uniform(_SHORTEST_PAUSE, longest))

    async def forget(self, ids: Collection[str]) -> int:
        count = 0
        wanted = list(set(ids))
        for start in range(0, len(wanted), _LOADED):
            part = wanted[start : start + _LOADED]
            # Of each id there is one or the other.
            keys = [key for task_id in part for key in self._pair(task_id)]
            count += await self._opened().command("DEL", *keys)
        return count

    def _complain(self, error: Exception, failures: int) -> None:
        if failures == 0:
            logger.warning(
                "The subscription to results was lost; it is tried again",
                extra={"event": "redis_subscription_lost", "url": self.url, "error": str(error)},
            )

    def _opened(self) -> Link:
        if self._link is None:
            raise BackendUnavailable(f"{self._address.url}: the result backend is not open")
        return self._link

    def _pair(self, task_id: str) -> tuple[str, str]:
        return self._keys.result(task_id), self._keys.state(task_id)

    async def _store(self, part: Sequence[tuple[Outcome, bytes]], ttl: float | None) -> list[str]:
        keys = [self._keys.none]
        keys += [key for outcome, _ in part for key in self._pair(outcome.task_id)]
        finals = [(outcome.task_id, text) for outcome, text in part if outcome.status.final]
        lasting = "" if ttl is None else max(1, round(ttl * 1000))
        words: list[Word] = [lasting, self._keys.results, *_news(finals)]
        for outcome, text in part:
            words += (1 if outcome.status.final else 0, text)
        refused = await self._opened().script(scripts.STORE, keys, words)
        return [part[position - 1][0].task_id for position in refused]

    async def _strange(self, batch: Sequence[Outcome], refused: list[str]) -> list[str]:
        """Return the refused ids but for those whose outcome is there from an earlier call.

        Of that the reply was lost.
        """
        asked = [task_id for task_id in refused if task_id in self._unsure]
        there = (
            await self._opened().command("MGET", *map(self._keys.result, asked)) if asked else ()
        )
        self._unsure.difference_update(outcome.task_id for outcome in batch)
        ours = {outcome.task_id: _encode(outcome) for outcome in batch}
        stored = {
            task_id for task_id, text in zip(asked, there, strict=True) if text == ours[task_id]
        }
        return [task_id for task_id in refused if task_id not in stored]

    def _read(self, task_id: str, text: bytes) -> Outcome:
        try:
            return _decode(text)
        except msgspec.MsgspecError as error:
            raise DecodeError(f"{self._keys.result(task_id)} holds no outcome: {error}") from error

    @asynccontextmanager
    async def _subscription(self) -> AsyncGenerator[AbstractConnection, None]:
        connection = await connect(self._address)
        try:
            await connection.send_command("SUBSCRIBE", self._keys.results)
            reply = await connection.read_response(timeout=_SILENCE)
            if not reply or reply[0] != b"subscribe":
                raise Disconnected("no answer to SUBSCRIBE")
            yield connection
        finally:
            await connection.disconnect(nowait=True)

    async def _listen(self, connection: AbstractConnection) -> list[str | Outcome]:
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


def _news(finals: Sequence[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """Return what the subscribers are told of final outcomes: their ids, and all of them or b""."""
    ids = _encode([task_id for task_id, _ in finals])
    if len(finals) > _TOLD or sum(len(text) for _, text in finals) > _TOLD_BYTES:
        return ids, b""
    return ids, b"[%b]" % b",".join(text for _, text in finals)
