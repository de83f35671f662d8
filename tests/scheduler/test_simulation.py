"""Years of random schedules, with schedulers that die at random: each run is sent once."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import pytest

from aiotaskq import Schedule, TaskQueue, at, crontab, every
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.recurrence.definition import Entry
from aiotaskq.scheduling import scheduler as module
from aiotaskq.scheduling.scheduler import Scheduler, run_id
from tests.scheduler.warp import BEGIN, WarpStore, run

YEAR = 365 * 86_400.0
LONG_PROFILE = os.environ.get("AIOTASKQ_TESTS_FAULTS") == "long"
YEARS, SCHEDULES = (10, 200) if LONG_PROFILE else (1, 30)
SEED = int(os.environ.get("AIOTASKQ_TESTS_FAULTS_SEED", "7"))
SCHEDULERS = 3
DEATHS = 0.02  # the share of swaps at which a scheduler dies
ZONES = ("UTC", "Europe/Paris", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata")


class CountingStore(WarpStore):
    """A memory store that counts messages and drops them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def _add(self, envelope: Envelope) -> None:
        self.sent[envelope.id] += 1


class DyingSchedules:
    """The schedules of a store, for a scheduler that may die with each change."""

    def __init__(self, store: ScheduleStore, life: RestartedScheduler) -> None:
        self._store = store
        self._life = life

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        return await self._store.load(ids)

    async def due(self, limit: int) -> DueSchedules:
        return await self._store.due(limit)

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        chance = self._life.chance.random()
        if chance < DEATHS / 2:
            await self._life.die()
        swapped = await self._store.compare_and_swap(schedule_id, seen, new, batch)
        if chance > 1 - DEATHS / 2:
            await self._life.die()
        return swapped


class DyingBroker(MemoryBroker):
    life: RestartedScheduler

    def clone(self) -> Self:
        copy = super().clone()
        copy.life = self.life
        return copy

    def schedules(self) -> Any:
        return DyingSchedules(super().schedules(), self.life)


class RestartedScheduler:
    """A scheduler that is started again after each death, at once or after days."""

    def __init__(
        self, store: CountingStore, declared: dict[str, Entry], chance: random.Random
    ) -> None:
        self._store = store
        self._declared = declared
        self._scheduler: Scheduler | None = None
        self._main: asyncio.Task[None] | None = None
        self.chance = chance
        self.deaths = 0

    async def live(self) -> None:
        while True:
            broker = DyingBroker(store=self._store)
            broker.life = self
            app = TaskQueue("simulated", broker=broker, beat_schedule=self._declared)
            self._scheduler = app.scheduler()
            self._main = asyncio.create_task(self._scheduler.run())
            await asyncio.wait([self._main])
            if not self._main.cancelled():
                self._main.result()
            await app.close()
            await asyncio.sleep(self.chance.choice([0.0, 0.0, 1.0, 600.0, 2 * 86_400.0]))

    async def die(self) -> None:
        """End like a process: no task of it takes another step."""
        assert self._scheduler is not None
        assert self._main is not None
        self.deaths += 1
        self._main.cancel()
        for task in self._scheduler._busy.values():
            task.cancel()
        await asyncio.Event().wait()


def random_schedule(chance: random.Random) -> Schedule:
    minute, hour, day = chance.randrange(60), chance.randrange(24), chance.randrange(1, 32)
    start = datetime.fromtimestamp(BEGIN + chance.random() * YEARS * YEAR, UTC)
    kinds: list[Callable[[], Any]] = [
        lambda: crontab(minute, hour),
        lambda: crontab(minute, hour, day_of_week=chance.randrange(7)),
        lambda: crontab(minute, hour, day_of_month=day),
        lambda: f"{minute} {hour} {day} {chance.randrange(1, 13)} mon",
        lambda: every(chance.uniform(86_400, 20 * 86_400)),
        lambda: every(timedelta(hours=chance.randrange(24, 500))),
        lambda: at(start),
        lambda: crontab("*/20"),
    ]
    when = chance.choices(kinds, weights=[2, 4, 6, 2, 3, 3, 3, 1])[0]()
    dense = when == crontab("*/20")
    return Schedule(
        when,
        timezone=chance.choice(ZONES),
        jitter=chance.choice([0.0, 0.0, 30.0]),
        misfire="all",
        start=start if dense else None,
        end=start + timedelta(days=3) if dense else None,
    )


@pytest.mark.timeout(600)
def test_each_run_of_years_is_sent_once_though_schedulers_die(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LOOK", YEAR)  # no schedule is added meanwhile
    chance = random.Random(SEED)
    declared = {f"s{n}": Entry("task", random_schedule(chance)) for n in range(SCHEDULES)}
    store = CountingStore()

    async def simulate() -> int:
        lives = [RestartedScheduler(store, declared, chance) for _ in range(SCHEDULERS)]
        tasks = [asyncio.create_task(life.live()) for life in lives]
        # Time enough for schedulers that are down at the end to come back.
        await asyncio.sleep(YEARS * YEAR + 30 * 86_400)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return sum(life.deaths for life in lives)

    deaths = run(simulate())
    expected = {
        run_id(name, due)
        for name, entry in declared.items()
        for due in entry.schedule.timing("UTC").between(BEGIN, BEGIN + YEARS * YEAR)
    }
    assert deaths > SCHEDULES / 10
    assert len(expected) > 10 * SCHEDULES
    assert expected - store.sent.keys() == set()
    assert {name for name, count in store.sent.items() if count > 1} == set()
