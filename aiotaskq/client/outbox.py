"""The outbox: tasks that wait in another store than the broker until a relay passes them on.

Mostly they are stored in PostgreSQL, in the transaction of their sender.

It is for applications whose broker is another system: no transaction spans both. A task is stored
beside the rows of its sender, and it is there if and only if these are. A relay in each worker
(`outbox_relay.py`) passes it on to the broker. The runs of schedules take the same way where the
broker stores no schedules (`schedule_store.py`).

The outbox is one queue of another broker, whose leases, batches and recovery keep it from
losing anything. Its messages are encoded envelopes.
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
    """Envelopes that wait for a relay to pass them on.

    Args:
        store: A closed broker that stores envelopes in transactions of a caller.
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
        """Store envelopes in the transaction that is open on a connection of the caller.

        Returns:
            The ids that were refused as they were stored before.
        """
        assert isinstance(self.store, Transactional)  # see TaskQueue
        return await self.store.publish_in(connection, [enclose(one) for one in batch])

    def consumer(self, *, name: str, lease: float) -> Consumer:
        """Return a closed consumer of the outbox."""
        return self.store.consumer([QUEUE], name=name, lease=lease)


def enclose(envelope: Envelope) -> Envelope:
    """Return an envelope of the outbox around an envelope for the broker."""
    # Times relative to the storing go to this store and, inside the body, to the next one: they
    # begin anew there, later by the time that the relay takes.
    return Envelope(
        id=envelope.id,
        queue=QUEUE,
        body=_encode(envelope),
        expires_at=envelope.expires_at,
        expires_in=envelope.expires_in,
        unique=envelope.unique,
    )


def disclose(delivery: Delivery) -> Envelope:
    """Return the envelope in a delivery of the outbox.

    Raises:
        DecodeError: There is no envelope in it.
    """
    try:
        envelope = _decoder.decode(delivery.body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise DecodeError(f"no envelope: {error}") from error
    # One that expired in the outbox goes on: a worker tells its end, like that of every task.
    if delivery.expired:
        return msgspec.structs.replace(envelope, expires_at=None, expires_in=0.0)
    return envelope
