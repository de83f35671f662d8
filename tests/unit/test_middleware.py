"""`Middleware`: the chain around a send and around a run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from aiotaskq import Message, Middleware, TaskContext, TaskFailed, TaskQueue, current_task
from aiotaskq.events import Sent
from aiotaskq.middleware import Run, Send, wrap_run, wrap_send


class Named(Middleware):
    """Middleware that records when it is entered and left."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    async def send(self, message: Message, proceed: Send) -> None:
        self.notes.append(f"{self.name} sends")
        await proceed(replace(message, headers={**message.headers, self.name: "was here"}))
        self.notes.append(f"{self.name} has sent")

    async def run(self, context: TaskContext, proceed: Run) -> Any:
        self.notes.append(f"{self.name} runs")
        value = await proceed(context)
        self.notes.append(f"{self.name} has run")
        return [self.name, value]


@pytest.fixture
async def app() -> AsyncIterator[TaskQueue]:
    app = TaskQueue("t", broker="memory://")
    async with app:
        yield app


async def test_the_first_is_outermost(app: TaskQueue) -> None:
    notes: list[str] = []
    app.add_middleware(Named("outer", notes))
    app.add_middleware(Named("inner", notes))

    @app.task
    async def headers() -> list[str]:
        return list(current_task().headers)

    handle = await headers.kiq()
    assert notes == ["outer sends", "inner sends", "inner has sent", "outer has sent"]
    notes.clear()
    async with app.worker():
        assert await handle.result(120) == ["outer", ["inner", ["outer", "inner"]]]
    assert notes == ["outer runs", "inner runs", "inner has run", "outer has run"]


async def test_middleware_that_overrides_nothing_is_not_called() -> None:
    async def send(message: Message) -> None: ...
    async def run(context: TaskContext) -> None: ...

    assert wrap_send([Middleware(), Middleware()], send) is send
    assert wrap_run([Middleware()], run) is run


async def test_raising_tells_the_caller_and_sends_nothing(app: TaskQueue) -> None:
    class Refuse(Middleware):
        async def send(self, message: Message, proceed: Send) -> None:
            raise PermissionError("not you")

    app.add_middleware(Refuse())
    sent: list[Sent] = []
    app.on(Sent)(sent.append)
    with pytest.raises(PermissionError):
        await app.send("anything")
    assert await (await app.broker()).depth() == {}
    assert sent == []


async def test_an_exception_of_a_run_can_be_changed(app: TaskQueue) -> None:
    class Translate(Middleware):
        async def run(self, context: TaskContext, proceed: Run) -> Any:
            try:
                return await proceed(context)
            except KeyError as error:
                raise LookupError("translated") from error

    app.add_middleware(Translate())

    @app.task
    async def fail() -> None:
        raise KeyError("x")

    async with app.worker():
        with pytest.raises(LookupError, match="translated") as caught:
            await (await fail.kiq()).result(120)
    assert isinstance(caught.value, TaskFailed)


async def test_many_calls_go_through_one_by_one_in_order(app: TaskQueue) -> None:
    notes: list[str] = []
    app.add_middleware(Named("m", notes))

    @app.task
    async def number(n: int) -> int:
        await asyncio.sleep(0)
        return n

    handles = await app.kiq_many([number.s(n) for n in range(3)])
    assert notes == ["m sends", "m has sent"] * 3
    async with app.worker():
        assert [await handle.result(120) for handle in handles] == [["m", n] for n in range(3)]  # type: ignore[comparison-overlap]  # the middleware changed it
