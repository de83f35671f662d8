"""A channel, and a server that answers in an order of its own."""

from __future__ import annotations

import asyncio

from pamqp import commands
from pamqp.base import Frame

from aiotaskq.drivers.rabbitmq.channel import Channel


class Wire:
    """Takes what is sent, and does nothing with it."""

    patience = 10.0
    frame_max = 1 << 16

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        """Nobody reads it."""

    def fail(self, error: Exception) -> None:
        raise error


async def tell(channel: Channel, method: Frame) -> None:
    """Hand it in as aiormq's reader does."""
    await channel.frames.put((0, method))


async def test_an_answer_to_consuming_may_come_after_answers_to_what_was_asked_later() -> None:
    """As RabbitMQ does it with quorum queues."""
    channel = Channel(Wire(), 1)
    consuming = asyncio.create_task(
        channel.call(commands.Basic.Qos(), commands.Basic.Consume(queue="q", consumer_tag="t"))
    )
    await asyncio.sleep(0)
    counting = asyncio.create_task(channel.call(commands.Queue.Declare(queue="q", passive=True)))
    await asyncio.sleep(0)
    await tell(channel, commands.Basic.QosOk())
    await tell(channel, commands.Queue.DeclareOk("q", 7, 0))
    await tell(channel, commands.Basic.ConsumeOk("t"))
    [declared] = await counting
    assert declared.message_count == 7
    assert [type(one) for one in await consuming] == [
        commands.Basic.QosOk,
        commands.Basic.ConsumeOk,
    ]
