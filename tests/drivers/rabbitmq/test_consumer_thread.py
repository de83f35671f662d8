"""The thread of a consumer: its tasks, and its end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiotaskq.drivers.rabbitmq.consumer_thread import ConsumerThread


async def test_tasks_that_cancelled_tasks_start_are_ended_as_well() -> None:
    """Tasks of aiormq do that."""
    tasks: list[asyncio.Task[None]] = []

    def begin() -> None:
        tasks.append(asyncio.get_running_loop().create_task(work()))

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            if len(tasks) < 3:
                begin()

    async def start() -> None:
        begin()

    thread = ConsumerThread()
    thread.start()
    await thread.run(start())
    await thread.stop()
    assert len(tasks) == 3
    assert all(task.done() for task in tasks)


async def test_stopping_does_not_wait_for_a_name_lookup() -> None:
    begun, answered = threading.Event(), threading.Event()

    def look_up() -> None:
        begun.set()
        answered.wait()

    thread = ConsumerThread()
    thread.start()
    try:
        looking = asyncio.create_task(thread.run(asyncio.to_thread(look_up)))
        await asyncio.to_thread(begun.wait)
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        await asyncio.wait_for(thread.stop(), 10.0)
    finally:
        answered.set()
