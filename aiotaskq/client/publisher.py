"""The publisher: sends envelopes, those of concurrent callers in one call.

::

    publish ──▶ waiting ──▶ one round: as many callers as fit ──▶ broker.publish ──▶ answer
                   ▲                                                  │
                   └── callers that come meanwhile wait for the next ◀┘

There is one sending task at most, so that envelopes are stored in the order of their callers. It
ends when nobody waits, and the next caller starts another. A caller that is cancelled does not take
its envelopes back: they may be on their way. Nor does one whose envelopes are refused concern the
others of its round: each caller hears of its own envelopes alone.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import TypeAlias, TypeVar

from aiotaskq.backoff import Backoff
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Envelope
from aiotaskq.errors import BatchRefused, BrokerFull, Unavailable
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.session")

T = TypeVar("T")
# The envelopes of one caller, and its answer: the ids that were refused as duplicates.
_Caller: TypeAlias = tuple[Sequence[Envelope], "asyncio.Future[Collection[str]]"]

_ROUND = 1000  # envelopes in one call
_ROUND_BYTES = 8 * 1024 * 1024
_TELL_EVERY = 30.0  # seconds between lines in the log about one outage
_PAUSES = (0.05, 1.0)  # seconds: the first pause while the server is away, and the longest


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
        self._waiting: list[_Caller] = []
        self._sender: asyncio.Task[None] | None = None

    async def publish(self, envelopes: Sequence[Envelope]) -> Collection[str]:
        """Store envelopes; return the ids that were refused as they were stored before.

        Raises:
            BatchRefused: Some of several envelopes were refused; all others are stored.
            BrokerUnavailable: The broker could not be reached for `timeout` seconds.
            BrokerFull: The broker has no room left. Raised at once: waiting makes no room.
            Exception: The reason why the only envelope, or each of them, was refused.
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
                try:
                    await self._send_round(callers)
                except BaseException:
                    for _, sent in callers:
                        sent.cancel()
                    raise
        finally:
            self._sender = None
            for _, sent in self._waiting:  # only when cancelled: the session closes
                sent.cancel()
            self._waiting.clear()

    async def _send_round(self, callers: Sequence[_Caller]) -> None:
        """Send the envelopes of some callers together, and tell each of them of its own."""
        try:
            refused = await self._send([one for envelopes, _ in callers for one in envelopes])
        except BatchRefused as error:
            _tell_each(callers, error)
        except Exception as error:  # any: it is the callers' to see
            if len(callers) == 1 or isinstance(error, Unavailable):
                _tell(callers, error)
                return
            # Nothing of the round is stored. Sent alone, each caller hears of its own envelopes.
            for caller in callers:
                await self._send_round([caller])
        else:
            for _, sent in callers:
                if not sent.done():
                    sent.set_result(refused)

    def _next_round(self) -> list[_Caller]:
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
    """Repeat a call while its server is away, for up to `timeout` seconds.

    The log tells of the outage at its beginning, and each half minute.

    Raises:
        Unavailable: The server was away for that time, or (`BrokerFull`) has no room.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    deadline, tell_at = begun + timeout, begun
    backoff = Backoff(*_PAUSES)
    while True:
        try:
            return await call()
        except BrokerFull:
            raise
        except Unavailable as error:
            now = loop.time()
            left = deadline - now
            if left <= 0:
                raise
            if now >= tell_at:
                tell_at = now + _TELL_EVERY
                logger.warning("trying again: %s", error)
        await asyncio.sleep(min(backoff.next(), left))


def _tell(callers: Iterable[_Caller], error: Exception) -> None:
    for _, sent in callers:
        if not sent.done():
            sent.set_exception(error)


def _tell_each(callers: Iterable[_Caller], error: BatchRefused) -> None:
    """Tell each caller which of its own envelopes were refused, if any."""
    first = 0  # the position of the caller's first envelope
    for envelopes, sent in callers:
        after = first + len(envelopes)
        own = {at - first: why for at, why in error.errors.items() if first <= at < after}
        first = after
        if sent.done():
            continue
        if not own:
            sent.set_result(error.answer)
        elif len(own) == len(envelopes):
            sent.set_exception(own[0])
        else:
            sent.set_exception(BatchRefused(own, answer=error.answer))
