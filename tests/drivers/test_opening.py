"""Resources of drivers that are opened once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from aiotaskq.drivers.common.opening import OpenOnce, SharedAttempt
from aiotaskq.errors import BrokerUnavailable


class Server:
    """Counts the connections that it gives, and gives them when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.ready = asyncio.Event()
        self.error: Exception | None = None

    async def connect(self) -> str:
        self.asked += 1
        await self.ready.wait()
        if self.error is not None:
            raise self.error
        return f"connection {self.asked}"


def closed() -> OpenOnce[str]:
    return OpenOnce(lambda: BrokerUnavailable("it is not open"))


async def waiting(*calls: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    """Start calls, and return them when each of them waits."""
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


async def test_it_is_made_once_until_it_is_released() -> None:
    server, once = Server(), closed()
    server.ready.set()
    await once.open(server.connect)
    await once.open(server.connect)
    assert once.get() == once.resource == "connection 1"
    assert once.release() == "connection 1"
    assert once.release() is None
    await once.open(server.connect)
    assert once.get() == "connection 2"


async def test_while_it_is_not_open_getting_it_is_an_error() -> None:
    server, once = Server(), closed()
    with pytest.raises(BrokerUnavailable, match="it is not open"):
        once.get()
    [task] = await waiting(once.open(server.connect))
    with pytest.raises(BrokerUnavailable, match="it is not open"):
        once.get()
    server.ready.set()
    await task
    once.release()
    with pytest.raises(BrokerUnavailable, match="it is not open"):
        once.get()


async def test_tasks_that_open_it_at_the_same_time_share_it() -> None:
    server, once = Server(), closed()
    tasks = await waiting(*(once.open(server.connect) for _ in range(5)))
    server.ready.set()
    await asyncio.gather(*tasks)
    assert (once.get(), server.asked) == ("connection 1", 1)


async def test_after_a_failure_each_task_that_waited_tries_itself() -> None:
    server, once = Server(), closed()
    tasks = await waiting(*(once.open(server.connect) for _ in range(3)))
    server.error = OSError("away")
    server.ready.set()
    assert [str(one) for one in await asyncio.gather(*tasks, return_exceptions=True)] == [
        "away"
    ] * 3
    assert (once.resource, server.asked) == (None, 3)
    server.error = None
    await once.open(server.connect)
    assert once.get() == "connection 4"


async def test_after_the_first_task_is_cancelled_the_next_one_opens_it() -> None:
    server, once = Server(), closed()
    first, second, third = await waiting(*(once.open(server.connect) for _ in range(3)))
    first.cancel()
    await asyncio.wait([first])
    server.ready.set()
    await asyncio.gather(second, third)
    assert first.cancelled()
    assert (once.get(), server.asked) == ("connection 2", 2)


async def test_a_task_that_waits_can_be_cancelled_alone() -> None:
    server, once = Server(), closed()
    first, second, third = await waiting(*(once.open(server.connect) for _ in range(3)))
    second.cancel()
    await asyncio.wait([second])
    server.ready.set()
    await asyncio.gather(first, third)
    assert second.cancelled()
    assert (once.get(), server.asked) == ("connection 1", 1)


def test_it_can_be_opened_in_one_event_loop_after_another() -> None:
    once = closed()

    async def open_twice_at_once() -> None:
        server = Server()
        tasks = await waiting(once.open(server.connect), once.open(server.connect))
        server.ready.set()
        await asyncio.gather(*tasks)
        assert once.release() == "connection 1"

    for _ in range(2):
        asyncio.run(open_twice_at_once())


async def test_a_release_does_not_wait_for_a_task_that_opens_it() -> None:
    server, once = Server(), closed()
    [task] = await waiting(once.open(server.connect))
    assert once.release() is None
    server.ready.set()
    await task
    assert once.get() == "connection 1"


# --- SharedAttempt ------------------------------------------------------------------------------


class Connecting:
    """An attempt that ends when it is told to, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.going_on = asyncio.Event()

    async def __call__(self) -> int:
        self.count += 1
        await self.going_on.wait()
        return self.count


async def test_callers_share_an_attempt_and_the_next_one_begins_another() -> None:
    connecting, attempt = Connecting(), SharedAttempt[int](LookupError)
    callers = [asyncio.ensure_future(attempt.result(connecting)) for _ in range(3)]
    await asyncio.sleep(0)
    connecting.going_on.set()
    assert await asyncio.gather(*callers) == [1, 1, 1]
    assert await attempt.result(connecting) == 2


async def test_a_cancelled_caller_does_not_stop_the_attempt_of_the_others() -> None:
    connecting, attempt = Connecting(), SharedAttempt[int](LookupError)
    first, second = (asyncio.ensure_future(attempt.result(connecting)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    connecting.going_on.set()
    assert await second == 1


async def test_a_cancelled_attempt_is_an_error_for_its_callers_and_no_cancellation() -> None:
    connecting, attempt = Connecting(), SharedAttempt[int](lambda: LookupError("closed"))
    caller = asyncio.ensure_future(attempt.result(connecting))
    while not connecting.count:
        await asyncio.sleep(0)
    await attempt.cancel()
    with pytest.raises(LookupError, match="closed"):
        await caller
    await attempt.cancel()  # there is none
    connecting.going_on.set()
    assert await attempt.result(connecting) == 2


async def test_the_failure_of_an_attempt_reaches_all_its_callers() -> None:
    attempt = SharedAttempt[int](LookupError)

    async def fail() -> int:
        raise OSError("away")

    ended = await asyncio.gather(attempt.result(fail), attempt.result(fail), return_exceptions=True)
    assert [type(one) for one in ended] == [OSError, OSError]
    with pytest.raises(OSError, match="away"):
        await attempt.result(fail)
