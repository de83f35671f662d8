"""Locks at the server: one connection at a time has one, and it ends with that connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pamqp.commands import Queue

from aiotaskq.backoff import Backoff
from aiotaskq.drivers.rabbitmq.channel import AmqpError, AmqpRefused, RabbitChannel
from aiotaskq.drivers.rabbitmq.connection import RESOURCE_LOCKED, RabbitConnection

_FIRST_PAUSE = 0.005  # seconds between attempts
_LONGEST_PAUSE = 0.1


@asynccontextmanager
async def server_lock(connection: RabbitConnection, name: str) -> AsyncIterator[None]:
    """Hold a lock: a queue that belongs to one connection alone. Waits without end.

    It excludes other connections, not other tasks on the same one. However this ends, the lock
    does not outlive it: the queue is deleted here, or by the server with the connection.

    Raises:
        AmqpRefused: This user may not declare the queue.
        AmqpDisconnected: The connection is gone.
        Unavailable: The server cannot be reached.
    """
    channel = await _lock(connection, name)
    try:
        yield
        with contextlib.suppress(AmqpError):  # then it ends with the connection
            await channel.call(Queue.Delete(queue=name))
    except BaseException:  # a cancellation as well
        # No waiting for the answer: a server without memory does not even read.
        _give_up(channel, name)
        raise
    _close(channel)


async def _lock(connection: RabbitConnection, name: str) -> RabbitChannel:
    """Become the only connection that has the lock; return the channel that it was made on."""
    backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
    while True:
        channel = await (await connection.transport()).open_channel()
        try:
            await channel.call(Queue.Declare(queue=name, exclusive=True, auto_delete=True))
        except AmqpRefused as error:
            if error.code != RESOURCE_LOCKED:
                raise
        except BaseException:  # a cancellation as well: the server may have granted it
            _give_up(channel, name)
            raise
        else:
            return channel
        await asyncio.sleep(backoff.next())


def _give_up(channel: RabbitChannel, name: str) -> None:
    with contextlib.suppress(AmqpError):  # the lock is gone with the channel's connection
        channel.send_unanswered(channel.pack(Queue.Delete(queue=name, nowait=True)))
    _close(channel)


def _close(channel: RabbitChannel) -> None:
    with contextlib.suppress(AmqpError):  # it is closed
        channel.abandon()
