"""The publisher: sends envelopes, those of concurrent callers in one call.

::

    publish ──▶ waiting ──▶ one round: as many callers as fit ──▶ broker.publish ──▶ answer
                   ▲                                                  │
                   └── callers that come meanwhile wait for the next ◀┘

There is one sending task at most, so that envelopes are stored in the order of their callers. It
ends when nobody waits, and the next caller starts another. A caller that is cancelled does not take
its envelopes back: they may be on their way.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import TypeVar

from aiotaskq.backoff import Backoff
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Envelope
from aiotaskq.errors import (
    BrokerFull,
    BrokerUnavailable,
)

T = TypeVar("T")

_ROUND = 1000  # envelopes in one call
_ROUND_BYTES = 8 * 1024 * 1024
_PAUSES = (0.05, 1.0)  # seconds: the first pause while the broker is away, and the longest


class Publisher:
    """Sends envelopes, those of concurrent callers together.

    A lone caller pays nothing for it: the first call goes out at once, and only the envelopes of
    callers that come while it is under way are gathered.

    Args:
        broker: The broker, open when `publish` is called.
        timeout: Seconds to go on trying when the broker cannot be reached.
    """

    def __init__(self, broker: Broker, timeout: float) -> None:
        self._broker = broker
        self._timeout = timeout
        self._waiting: list[tuple[Sequence[Envelope], asyncio.Future[Collection[str]]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def publish(self, envelopes: Sequence[Envelope]) -> Collection[str]:
        """Store envelopes; return the ids that were refused as they were stored before.

        Raises:
            BrokerUnavailable: The broker could not be reached for `timeout` seconds.
            BrokerFull: The broker has no room left. Raised at once: waiting makes no room.
        """
        sent = asyncio.get_running_loop().create_future()
        self._waiting.append((envelopes, sent))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_waiting())
        return await sent  # type: ignore[no-any-return]  # a Future made by the loop is untyped

    async def _send_waiting(self) -> None:
        try:
            while self._waiting:
                callers = self._next_round()
                batch = [envelope for envelopes, _ in callers for envelope in envelopes]
                try:
                    refused = await self._send(batch)
                except Exception as error:  # every caller is told
                    _tell(callers, error)
                except BaseException:
                    for _, sent in callers:
                        sent.cancel()
                    raise
                else:
                    for _, sent in callers:
                        if not sent.done():
                            sent.set_result(refused)
        finally:
            self._sender = None
            for _, sent in self._waiting:  # only when cancelled: the session closes
                sent.cancel()
            self._waiting.clear()

    def _next_round(self) -> list[tuple[Sequence[Envelope], asyncio.Future[Collection[str]]]]:
        """Take as many waiting callers as fit one call, at least one."""
        count = size = taken = 0
        for envelopes, _ in self._waiting:
            count += len(envelopes)
            size += sum(len(envelope.body) for envelope in envelopes)
            if taken and (count > _ROUND or size > _ROUND_BYTES):
                break
            taken += 1
        callers, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return callers

    async def _send(self, batch: Sequence[Envelope]) -> Collection[str]:
        call_id = uuid.uuid4().hex  # so that a repeat after a lost reply stores nothing twice
        return await persist(lambda: self._broker.publish(batch, call_id=call_id), self._timeout)

    async def close(self) -> None:
        """Wait for the calls that are under way."""
        if self._sender is not None:
            await asyncio.wait([self._sender])


async def persist(call: Callable[[], Awaitable[T]], timeout: float) -> T:
    """Repeat a call while the broker is away, for up to `timeout` seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    backoff = Backoff(*_PAUSES)
    while True:
        try:
            return await call()
        except BrokerFull:
            raise
        except BrokerUnavailable:
            left = deadline - loop.time()
            if left <= 0:
                raise
        await asyncio.sleep(min(backoff.next(), left))


def _tell(
    callers: Iterable[tuple[Sequence[Envelope], asyncio.Future[Collection[str]]]], error: Exception
) -> None:
    for _, sent in callers:
        if not sent.done():
            sent.set_exception(error)
