"""The thread in which a consumer's connection lives."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiotaskq.drivers.rabbitmq.thread import LoopThread


async def test_what_a_task_begins_as_it_is_cancelled_is_ended_as_well() -> None:
    """As aiormq's tasks do."""
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

    thread = LoopThread()
    thread.start()
    await thread.run(start())
    await thread.stop()
    assert len(tasks) == 3
    assert all(task.done() for task in tasks)


async def test_who_ends_it_does_not_wait_for_a_name_look_up() -> None:
    begun, answered = threading.Event(), threading.Event()

    def look_up() -> None:
        begun.set()
        answered.wait()

    thread = LoopThread()
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
