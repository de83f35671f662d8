"""The outbox: tasks that wait in PostgreSQL, committed with what else their sender wrote there.

For applications whose broker is another system: no transaction spans both. So a task is stored
beside the sender's own rows, and there if and only if these are; a relay in the workers
(`worker.relay`) passes it on to the broker. It is a queue of its own in a PostgreSQL broker, with
all that keeps such a queue from losing anything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from aiotaskq.contract.broker import Broker, Consumer, Transactional
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.errors import DecodeError

QUEUE = "outbox"

_decoder = msgspec.msgpack.Decoder(Envelope)
_encode = msgspec.msgpack.Encoder().encode


class Outbox:
    """Where envelopes wait until a relay passes them on.

    Args:
        store: A broker that stores within transactions of the caller's; closed.
    """

    def __init__(self, store: Broker) -> None:
        self.store = store

    async def open(self) -> None:
        """Connect, and make the tables. Idempotent.

        Raises:
            BrokerUnavailable: It cannot be reached now.
        """
        await self.store.open()

    async def close(self) -> None:
        """Let go of everything. Idempotent, never raises."""
        await self.store.close()

    async def publish_in(self, connection: object, batch: Sequence[Envelope]) -> Collection[str]:
        """Store envelopes in the transaction that is open on a connection of the caller's.

        Returns:
            Ids that were refused because they were stored before.
        """
        assert isinstance(self.store, Transactional)  # see TaskQueue
        return await self.store.publish_in(connection, [_enclose(one) for one in batch])

    def consumer(self, *, name: str, lease: float) -> Consumer:
        """Return what takes envelopes out, not open yet."""
        return self.store.consumer([QUEUE], name=name, lease=lease)


def _enclose(envelope: Envelope) -> Envelope:
    # What is relative to the time of storing is told to this store and to the next one: the
    # time in between is what the relay takes.
    return Envelope(
        id=envelope.id,
        queue=QUEUE,
        body=_encode(envelope),
        expires_at=envelope.expires_at,
        expires_in=envelope.expires_in,
        unique=envelope.unique,
    )


def disclose(delivery: Delivery) -> Envelope:
    """Return the envelope that was stored.

    Raises:
        DecodeError: It is none.
    """
    try:
        envelope = _decoder.decode(delivery.body)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"no envelope: {error}") from error
    # One that expired here is to be told so by a worker, which every task's end is.
    if delivery.expired:
        return msgspec.structs.replace(envelope, expires_at=None, expires_in=0.0)
    return envelope
