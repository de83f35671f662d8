"""The ledger: the stream of membership records, and the state that follows from them.

Theory of operation
-------------------
The state is a pure function of the records read so far, applied in their order. Two processes that
have read up to the same record agree on it, except for old records: the server drops them after
`_DAYS` days, in whole segments and so possibly later, and a process forgets ids that many days
after it read them.

After the stream was deleted or moved, it is read again from its beginning. So applying a record a
second time must change nothing: joining again replaces the entry, and a cancellation is followed by
the same restoration as the first time. The cancellations of a stream that is gone stay known to the
processes that have read them.

A consumer is known until a record says that it has left. One that died cannot write it: `survey.py`
finds it gone and writes it for all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

from aiotaskq.contract.records import ConsumerInfo
from aiotaskq.drivers.common.retention import CANCELLED_IDS_FOR
from aiotaskq.drivers.rabbitmq.connection import RabbitConnection
from aiotaskq.drivers.rabbitmq.membership.losses import HarmlessLosses
from aiotaskq.drivers.rabbitmq.membership.records import (
    ConsumerJoined,
    ConsumerLeft,
    ConsumerSurvived,
    LedgerRead,
    LedgerRecord,
    MessagesCancelled,
    MessagesRestored,
    decode_record,
    encode,
)
from aiotaskq.drivers.rabbitmq.membership.stream import RabbitStream

_DAYS = round(CANCELLED_IDS_FOR / 86_400)  # for which the server keeps records


_CONSUMER = re.compile(r".*:[0-9a-f]{32}", re.DOTALL)  # an id that `consumer.py` gives


class RecentNames:
    """Names that were noted within the time for which the ledger keeps records.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._noted: dict[str, float] = {}  # name -> time, the oldest first

    def __contains__(self, name: object) -> bool:
        return name in self._noted

    def note(self, names: Iterable[str]) -> None:
        """Add names, and forget the old ones."""
        now = self._clock()
        for name in names:
            self._noted.pop(name, None)
            self._noted[name] = now
        # A process that remembered them for longer would disagree with those that start later.
        while (
            self._noted and now - self._noted[oldest := next(iter(self._noted))] > CANCELLED_IDS_FOR
        ):
            del self._noted[oldest]

    def drop(self, names: Iterable[str]) -> None:
        """Forget names."""
        for name in names:
            self._noted.pop(name, None)


class Ledger:
    """The records, as far as this process has read them.

    Args:
        connection: The connection to write on.

    Attributes:
        stream: The stream of records.
        consumers: The consumers that have joined and not left, by id.
        cancelled: The ids of messages that were cancelled and not restored.
        harmless: Lost connections that were no crashes.
        on_record: Called with each record after it was applied.
    """

    def __init__(self, connection: RabbitConnection) -> None:
        self.stream = RabbitStream(
            connection,
            connection.names.declare_stream(connection.names.ledger, days=_DAYS),
            self._apply,
            encode(LedgerRead()),
        )
        self.consumers: dict[str, ConsumerInfo] = {}
        self.cancelled = RecentNames()
        self.harmless = HarmlessLosses()
        self.on_record: Callable[[LedgerRecord], None] = lambda _: None

    async def write(self, record: LedgerRecord) -> None:
        """Append a record.

        Raises:
            Unavailable: The server cannot be reached; the record may have been written.
        """
        await self.stream.write(encode(record))

    def _apply(self, body: bytes) -> None:
        record = decode_record(body)
        match record:
            case ConsumerJoined() if not _CONSUMER.fullmatch(record.consumer):
                return  # nobody of us: it cannot be asked
            case ConsumerJoined():
                self.consumers[record.consumer] = ConsumerInfo(
                    id=record.consumer, queues=record.queues, about=record.about
                )
            case ConsumerLeft():
                self.consumers.pop(record.consumer, None)
            case MessagesCancelled():
                self.cancelled.note(record.ids)
            case MessagesRestored():
                self.cancelled.drop(record.ids)
            case ConsumerSurvived():
                self.harmless.note(record.consumer, record.held)
        self.on_record(record)
