"""Lifespans of workers: start-up, shutdown and state."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from aiotaskq import (
    State,
    TaskQueue,
    current_task,
)
from tests.worker.events import LONG


async def test_lifespans_begin_in_order_and_end_in_the_reverse_order(app: TaskQueue) -> None:
    told: list[str] = []

    @app.lifespan
    async def first(state: State) -> AsyncIterator[None]:
        state.number = 7
        told.append("first begins")
        yield
        told.append("first ends")

    @app.on_startup
    async def up(state: State) -> None:
        state.number += 1
        told.append("up")

    @app.on_shutdown
    async def down(state: State) -> None:
        told.append(f"down {state.number}")

    @app.lifespan
    async def last(state: State) -> AsyncIterator[None]:
        told.append("last begins")
        yield
        told.append("last ends")

    @app.task
    async def job() -> int:
        told.append("job")
        return int(current_task().state.number)

    @app.task
    def plain() -> int:
        return int(current_task().state.number)

    async with app.worker():
        assert await (await job.kiq()).result(LONG) == 8
        assert await (await plain.kiq()).result(LONG) == 8
    assert told == [
        "first begins", "up", "last begins", "job", "last ends", "down 8", "first ends",
    ]  # fmt: skip


async def test_each_worker_has_a_state_of_its_own(app: TaskQueue) -> None:
    states: list[State] = []

    @app.on_startup
    async def up(state: State) -> None:
        states.append(state)

    async with app.worker(), app.worker():
        pass
    assert len({id(state) for state in states}) == 2


async def test_a_lifespan_that_fails_at_start_raises_and_ends_the_earlier_ones(
    app: TaskQueue,
) -> None:
    told: list[str] = []

    @app.lifespan
    async def first(state: State) -> AsyncIterator[None]:
        try:
            yield
        finally:
            told.append("undone")

    @app.on_startup
    async def up(state: State) -> None:
        raise LookupError("no database")

    @app.task
    async def job() -> None:
        told.append("ran")

    await job.kiq()
    with pytest.raises(LookupError, match="no database"):
        async with app.worker():
            told.append("entered")
    assert told == ["undone"]


async def test_a_missing_name_of_the_state_is_an_attribute_error(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        current_task().state.pool  # noqa: B018

    async with app.worker():
        error = (await (await job.kiq()).wait(LONG)).error
    assert isinstance(error, AttributeError)
    assert "state has no 'pool'" in str(error)
