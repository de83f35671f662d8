"""Schedules that cannot be read."""

from __future__ import annotations

import asyncio
import logging

import pytest

from aiotaskq import ConfigError, every
from aiotaskq.contract.records import StoredSchedule
from aiotaskq.drivers.memory.schedules import MemorySchedules
from tests.scheduler.test_scheduler import World, play
from tests.scheduler.warp import BEGIN

RIGHT = '{"definition":{"task":"t","timing":{"when":{"type":"every","seconds":1.0}}%s},"state":%s}'
BODIES = [
    b"",
    b"garbage",
    b"\xff",
    b"{}",
    b"[" * 100_000 + b"]" * 100_000,
    (RIGHT % (',"grace":1e999', "{}")).encode(),
    (RIGHT % ("", '{"due":1e308}')).encode(),
    (RIGHT % ("", '{"due":"x"}')).encode(),
]


async def put(world: World, name: str, body: bytes) -> None:
    schedule = StoredSchedule(id=name, body=body, due_at=BEGIN - 1.0, revision="r")
    assert await MemorySchedules(world.store).compare_and_swap(name, None, schedule)


def test_a_schedule_that_cannot_be_read_is_parked_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)

    async def act(world: World) -> None:
        app = world.app()
        await app.schedules.add("good", "good", every(1))
        for number, body in enumerate(BODIES):
            await put(world, f"odd {number}", body)
        async with app.scheduler() as first, app.scheduler() as second:
            await asyncio.sleep(100.5)
            assert first.parked + second.parked == len(BODIES)
        assert len(world.sent) == 100
        listed = {one.id: one for one in await app.schedules.list()}
        assert "cannot be read" in listed["odd 0"].when
        with pytest.raises(ConfigError, match="cannot be read"):
            await app.schedules.pause("odd 0")
        assert await app.schedules.remove("odd 0")
        await app.schedules.add("odd 1", "fine", every(1), replace=True)

    play(act)
    assert len([one for one in caplog.records if "is parked" in one.getMessage()]) == len(BODIES)


def test_a_schedule_of_the_code_takes_the_place_of_one_that_cannot_be_read() -> None:
    async def act(world: World) -> None:
        await put(world, "nightly", b"garbage")
        app = world.app(beat_schedule={"nightly": {"task": "t", "schedule": 1}})
        async with app.scheduler():
            await asyncio.sleep(5.5)
        assert len(world.sent) == 5

    play(act)


def test_a_schedule_that_is_due_without_a_run_keeps_nobody_busy() -> None:
    async def act(world: World) -> None:
        await put(world, "ended", (RIGHT % ("", "{}")).encode())
        await put(world, "paused", (RIGHT % ("", f'{{"due":{BEGIN},"paused":true}}')).encode())
        app = world.app()
        async with app.scheduler():
            await asyncio.sleep(2)
        found = await MemorySchedules(world.store).load()
        assert [one.due_at for one in found] == [None, None]
        assert not world.sent

    play(act)
