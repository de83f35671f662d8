"""The audience of a sender: live workers that serve a queue and know a task.

A task that is sent where nobody takes it is not lost, but its caller waits in vain. So the first
time that a task goes to a queue, the live workers are looked at a moment later, in the background,
and the log tells if none of them is for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Message
from aiotaskq.contract.records import read_worker_info
from aiotaskq.errors import AioTaskQError
from aiotaskq.readable import get_logger, on_one_line

logger = get_logger("aiotaskq.session")

_A_MOMENT = 1.0  # seconds: workers and senders are often started together
_MOST_PAIRS = 1000  # pairs that are remembered; anybody may send to more


class Audience:
    """The live workers, as a sender sees them.

    Args:
        broker: The broker, open when a message is noted.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._seen: set[tuple[str, str]] = set()
        self._new: set[tuple[str, str]] = set()
        self._looking: asyncio.Task[None] | None = None

    def note(self, messages: Iterable[Message]) -> None:
        """Note messages that were sent; look at the workers if a pair of queue and task is new."""
        for message in messages:
            pair = message.queue, message.task
            if pair not in self._seen and len(self._seen) < _MOST_PAIRS:
                self._seen.add(pair)
                self._new.add(pair)
        if self._new and self._looking is None and self._broker.traits.shared:
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        try:
            while self._new:
                await asyncio.sleep(_A_MOMENT)
                pairs, self._new = self._new, set()
                await self._tell(pairs)
        except AioTaskQError as error:  # it is away, or allows no look
            logger.debug("cannot see which workers there are: %s", error)
        except Exception:  # nothing that is sent depends on it
            logger.exception("cannot see which workers there are")
        finally:
            self._looking = None

    async def _tell(self, pairs: Iterable[tuple[str, str]]) -> None:
        known: dict[str, set[str]] = {}
        for consumer in await self._broker.consumers():
            info = read_worker_info(consumer.about)
            for queue in consumer.queues:
                known.setdefault(queue, set()).update(() if info is None else info.tasks)
        for queue, task in sorted(pairs):
            if queue not in known:
                logger.warning(
                    "%s was sent to the queue %s, which no live worker serves; it waits there",
                    on_one_line(task),
                    on_one_line(queue),
                )
            elif task not in known[queue]:
                logger.warning(
                    "%s was sent to the queue %s, and no live worker of this queue knows it: is"
                    " the queue another application's?",
                    on_one_line(task),
                    on_one_line(queue),
                )

    async def close(self) -> None:
        """End looking."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
