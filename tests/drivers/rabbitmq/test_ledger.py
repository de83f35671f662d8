"""The ledger: reading it again when the server ended that, and ids that it forgets."""

from __future__ import annotations

import asyncio

from pamqp.commands import Queue

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.rabbitmq.membership.ledger import RecentNames
from aiotaskq.drivers.rabbitmq.names import RabbitNames
from aiotaskq.drivers.rabbitmq.transport import connect
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import BrokerUnavailable

PATIENCE = 120.0


async def delete(url: str, queue: str) -> None:
    """Delete a queue, as an operator may do."""
    transport = await connect(parse_url(url))
    await (await transport.open_channel()).call(Queue.Delete(queue=queue))
    await transport.close()


async def count(broker: RabbitBroker) -> int:
    """Return the number of consumers that are known."""
    try:
        return len(await broker.consumers())
    except BrokerUnavailable:  # a channel that wrote to the old stream cannot write to the new one
        return 0


async def test_consumers_read_on_in_a_ledger_that_was_deleted_and_made_again(
    url: str, prefix: str
) -> None:
    broker = RabbitBroker(url, prefix=prefix)
    await broker.open()
    consumers = [broker.consumer(["q"], name="w", lease=60.0) for _ in range(3)]
    for one in consumers:
        await one.open()
    assert not await broker.cancel(["early"])
    await delete(url, RabbitNames(prefix, "quorum").ledger)
    async with asyncio.timeout(PATIENCE):
        while await count(broker) < 3:
            await asyncio.sleep(0.05)
    names = [f"{number}" for number in range(20)]
    for name in ["early", *names]:
        await broker.publish([Envelope(id=name, queue="q", body=b"x")])
    held = [one for consumer in consumers for one in await consumer.fetch(2, 1.0)]
    assert len(held) == 6, "an id that was cancelled before must still be known"
    assert "early" not in {one.id for one in held}
    await broker.cancel(names)
    for consumer in consumers:
        assert len((await consumer.news()).cancelled) == 2
        assert not await consumer.fetch(1, 0.1)
        await consumer.close()
    await broker.close()


def test_cancelled_ids_are_known_for_a_week_and_not_for_ever() -> None:
    now, day = 0.0, 86_400.0
    recent = RecentNames(lambda: now)
    recent.note(["a", "b", "c"])
    recent.drop(["c", "never"])
    now = 6.0 * day
    recent.note(["b", "d"])
    assert [name for name in "abcd" if name in recent] == ["a", "b", "d"]
    now = 7.5 * day
    recent.note(["e"])
    assert [name for name in "abcde" if name in recent] == ["b", "d", "e"]
