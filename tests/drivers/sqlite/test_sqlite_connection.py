"""Calls that are cancelled while the thread of the connection works on them."""

from __future__ import annotations

import asyncio

from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.sqlite import SQLiteBroker
from tests.drivers.sqlite.tools import (
    NEVER,
    PATIENCE,
    envelope,
    listening,
    names,
    opened,
)


async def test_a_cancelled_call_is_finished_by_the_thread(broker: SQLiteBroker) -> None:
    for number in range(50):
        task = asyncio.create_task(broker.publish([envelope(f"{number}.{n}") for n in range(20)]))
        await asyncio.sleep(0.0001 * number)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    consumer = await opened(broker)
    stored = names(await consumer.fetch(10_000, 0))
    assert len(stored) % 20 == 0  # whole transactions only
    assert len(set(stored)) == len(stored)
    await consumer.close()


async def test_messages_of_a_cancelled_fetch_go_to_others_too(
    broker: SQLiteBroker,
) -> None:
    broker._listener.poll = NEVER
    clone = broker.clone()
    await clone.open()
    other = await opened(clone)
    waiting = asyncio.create_task(other.fetch(1, NEVER))
    await listening(broker)
    consumer = await opened(broker)
    await broker.publish([envelope("a")])
    async with asyncio.timeout(PATIENCE):
        [first] = await waiting
        assert not await other.settle([Done(first)])
        for number in range(30):
            await broker.publish([envelope(f"{number}")])
            task = asyncio.create_task(consumer.fetch(1, 0))
            await asyncio.sleep(0)
            task.cancel()  # the thread is about to take it, or has done so
            await asyncio.gather(task, return_exceptions=True)
            [got] = await other.fetch(1, NEVER)
            assert got.id == f"{number}"
            assert not await other.settle([Done(got)])
    await other.close()
    await consumer.close()
    await clone.close()
