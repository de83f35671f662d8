"""A channel, and a server that answers in an order of its own."""

from __future__ import annotations

import asyncio

from pamqp import commands
from pamqp.base import Frame

from aiotaskq.drivers.rabbitmq.channel import RabbitChannel


class SilentTransport:
    """Takes frames, and answers nothing."""

    answer_timeout = 10.0
    frame_max = 1 << 16

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        """Drop the frames."""

    def fail(self, error: Exception) -> None:
        raise error


async def receive(channel: RabbitChannel, method: Frame) -> None:
    """Pass a frame to a channel, as aiormq's reader does."""
    await channel.frames.put((0, method))


async def test_the_reply_to_consume_may_come_after_the_replies_to_later_calls() -> None:
    """RabbitMQ does that with quorum queues."""
    channel = RabbitChannel(SilentTransport(), 1)
    consuming = asyncio.create_task(
        channel.call(commands.Basic.Qos(), commands.Basic.Consume(queue="q", consumer_tag="t"))
    )
    await asyncio.sleep(0)
    counting = asyncio.create_task(channel.call(commands.Queue.Declare(queue="q", passive=True)))
    await asyncio.sleep(0)
    await receive(channel, commands.Basic.QosOk())
    await receive(channel, commands.Queue.DeclareOk("q", 7, 0))
    await receive(channel, commands.Basic.ConsumeOk("t"))
    [declared] = await counting
    assert declared.message_count == 7
    assert [type(one) for one in await consuming] == [
        commands.Basic.QosOk,
        commands.Basic.ConsumeOk,
    ]
