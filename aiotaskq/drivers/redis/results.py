"""The Redis result backend: a readable key for each outcome, and a channel for final ones.

Theory of operation
-------------------

The outcome of an id is absent, not final, or final. One script writes a batch: the first final
outcome of an id stays, and all later ones are refused, from any process and in any order.
The same script publishes the new final outcomes. So an outcome that can be loaded has been
published, and the other way round.

* The reply of `store` may be lost after the script has run. The caller stores the batch again,
  and the script refuses the ids that have one. `RedisOutcomes` remembers which ids are uncertain.
  It then compares the stored outcome with its own, and does not report its own as refused.
* A subscription may break between two outcomes. The empty item after a reconnect says so, and
  waiting callers then load. Nothing is published twice or kept for late subscribers, so a caller
  first subscribes, and then loads.
* Keys expire by themselves. An expired outcome is absent.

The backend is closed, open, and closed again; it has one connection for commands, and another one
for each subscription.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import ClassVar, Self

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.common.opening import OpenOnce
from aiotaskq.drivers.redis.connection import RedisConnection
from aiotaskq.drivers.redis.keys import RedisKeys
from aiotaskq.drivers.redis.notify import subscribe_to_outcomes
from aiotaskq.drivers.redis.outcomes import RedisOutcomes
from aiotaskq.drivers.redis.url import parse_url
from aiotaskq.errors import BackendUnavailable


class RedisBackend:
    """Outcomes as strings of JSON.

    Args:
        url: As for `RedisBroker`.
        prefix: The beginning of all keys.

    Raises:
        ConfigError: The URL is wrong.
    """

    wants_arguments: ClassVar[bool] = False

    def __init__(self, url: str, *, prefix: str = "aiotaskq") -> None:
        self._given_url = url
        self._server = parse_url(url)
        self._keys = RedisKeys(prefix)
        self._outcomes = OpenOnce[RedisOutcomes](
            lambda: BackendUnavailable(f"{self.url}: the result backend is not open")
        )

    @property
    def url(self) -> str:
        return self._server.url

    def clone(self) -> Self:
        return type(self)(self._given_url, prefix=self._keys.given)

    async def open(self) -> None:
        await self._outcomes.open(self._connect)

    async def close(self) -> None:
        outcomes = self._outcomes.release()
        if outcomes is not None:
            await outcomes.close()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        return await self._outcomes.get().store(batch, ttl)

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        return await self._outcomes.get().load(ids)

    def subscribe(self) -> AsyncGenerator[Sequence[str | Outcome], None]:
        return subscribe_to_outcomes(self._server.connect, self._keys.results, self.url)

    async def forget(self, ids: Collection[str]) -> int:
        return await self._outcomes.get().forget(ids)

    async def _connect(self) -> RedisOutcomes:
        connection = RedisConnection(self._server, BackendUnavailable)
        await connection.open()
        return RedisOutcomes(connection, self._keys)
