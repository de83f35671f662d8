"""Schedulers over a memory store, with a clock that jumps from timer to timer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from zoneinfo import ZoneInfo

import pytest

from aiotaskq import (
    BrokerUnavailable,
    ConfigError,
    Message,
    Middleware,
    Retry,
    Schedule,
    TaskQueue,
    at,
    crontab,
    every,
)
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.drivers.memory.schedules import MemorySchedules
from aiotaskq.events import Sent
from aiotaskq.middleware import Send
from tests.scheduler.warp import BEGIN, WarpStore, entered, run

OSLO = ZoneInfo("Europe/Oslo")  # read now: reading a file would block the loop


class FarBroker(MemoryBroker):
    """A broker whose schedules may be unreachable."""

    away: ClassVar[set[WarpStore]] = set()
    looks = 0

    def schedules(self) -> MemorySchedules:
        return FarSchedules(super().schedules()._store)


class FarSchedules(MemorySchedules):
    async def due(self, limit: int) -> DueSchedules:
        FarBroker.looks += 1
        if self._store in FarBroker.away:
            raise BrokerUnavailable("it is away")
        return await super().due(limit)


class World:
    """A store, and the applications and schedulers that use it."""

    def __init__(self) -> None:
        self.store = WarpStore()
        self.sent: list[Message] = []

    def app(self, **settings: Any) -> TaskQueue:
        app = TaskQueue("app", broker=FarBroker(store=self.store), **settings)
        app.observers.add(Sent, lambda event: self.sent.append(event.message))
        return app

    @property
    def times(self) -> list[str]:
        """The ids that were sent, without their common part."""
        return [one.id.replace("2026-01-01T00:00:", ":") for one in self.sent]


def play(act: Callable[[World], Awaitable[None]]) -> World:
    """Run a test function in a world of its own, from the first second of 2026 on."""
    world = World()

    async def whole() -> None:
        await act(world)

    run(whole())
    return world


def entry(schedule: Any, **more: Any) -> Mapping[str, Mapping[str, Any]]:
    return {"one": {"task": "tasks.one", "schedule": schedule, **more}}


def test_runs_are_sent_at_their_due_times_which_their_ids_contain() -> None:
    async def act(world: World) -> None:
        async with world.app(beat_schedule=entry(timedelta(seconds=10))).scheduler():
            await asyncio.sleep(35)

    world = play(act)
    assert world.times == ["one@:10Z", "one@:20Z", "one@:30Z"]
    assert {one.task for one in world.sent} == {"tasks.one"}


def test_several_schedulers_send_each_run_once() -> None:
    async def act(world: World) -> None:
        first, second, third = (world.app(beat_schedule=entry(1)) for _ in range(3))
        async with first.scheduler(), second.scheduler(), third.scheduler():
            await asyncio.sleep(30.5)

    world = play(act)
    assert len(world.times) == len(set(world.times)) == 30


def test_arguments_and_options_go_with_each_run() -> None:
    async def act(world: World) -> None:
        app = world.app(
            beat_schedule=entry(
                1,
                args=(1, "two"),
                kwargs={"three": [3]},
                options={
                    "queue": "slow",
                    "priority": 7,
                    "expires": timedelta(minutes=1),
                    "retry": Retry(max_attempts=4, delay=2),
                    "timeout": 5,
                },
            )
        )
        async with app.scheduler():
            await asyncio.sleep(1.5)

    (message,) = play(act).sent
    assert bytes(message.args) == b'[1,"two"]'
    assert bytes(message.kwargs) == b'{"three":[3]}'
    assert (message.queue, message.priority, message.timeout) == ("slow", 7, 5)
    assert message.expires_at == pytest.approx(message.sent_at + 60)
    assert message.retry is not None
    assert (message.retry.max_attempts, message.retry.delay) == (4, 2)


def test_a_task_may_carry_its_own_schedule_and_runs_with_its_arguments() -> None:
    async def act(world: World) -> None:
        app = world.app()

        @app.task(name="add", schedule=Schedule(every(1), args=[2, 3]))
        async def add(x: int, y: int) -> int:
            return x + y

        async with entered(app.worker()), app.scheduler():
            await asyncio.sleep(1.5)
            assert await app.handle("add@2026-01-01T00:00:01Z").result() == 5

    play(act)


def test_a_deployment_changes_and_removes_schedules() -> None:
    async def act(world: World) -> None:
        app = world.app(
            beat_schedule={
                "stays": {"task": "t", "schedule": 10},
                "changes": {"task": "t", "schedule": 10},
                "goes": {"task": "t", "schedule": 10},
            }
        )
        async with app.scheduler():
            await app.schedules.add("made by hand", "t", 10)
            await asyncio.sleep(15)
        app = world.app(
            beat_schedule={
                "stays": {"task": "t", "schedule": 10},
                "changes": {"task": "t", "schedule": 4},
                "comes": {"task": "t", "schedule": 10},
            }
        )
        async with app.scheduler():
            await asyncio.sleep(2)
            found = {one.id: one for one in await app.schedules.list()}
        assert sorted(found) == ["changes", "comes", "made by hand", "stays"]
        assert found["changes"].when == "every 4 s"
        assert [found[name].runs for name in ("changes", "stays", "comes")] == [2, 1, 0]

    play(act)


def test_another_application_of_the_same_store_keeps_its_schedules() -> None:
    async def act(world: World) -> None:
        broker = MemoryBroker(store=world.store)
        mine = TaskQueue("mine", broker=broker, beat_schedule=entry(10))
        other = TaskQueue("other", broker=broker)
        async with mine.scheduler():
            await asyncio.sleep(1)
        async with other.scheduler():
            await asyncio.sleep(1)
        assert [one.id for one in await other.schedules.list()] == ["one"]

    play(act)


@pytest.mark.parametrize(
    ("misfire", "expected"),
    [
        ("once", ["one@:10Z", "one@2026-01-01T00:09:50Z", "one@2026-01-01T00:10:00Z"]),
        ("skip", ["one@:10Z", "one@2026-01-01T00:09:50Z", "one@2026-01-01T00:10:00Z"]),
        ("all", [f"one@2026-01-01T00:{n // 6:02}:{n % 6}0Z" for n in range(1, 61)]),
    ],
)
def test_late_runs_follow_the_misfire_policy_of_the_schedule(
    misfire: Any, expected: list[str]
) -> None:
    async def act(world: World) -> None:
        schedule = Schedule(every(10), misfire=misfire, grace=9)
        async with world.app(beat_schedule=entry(schedule)).scheduler():
            await asyncio.sleep(15)
        await asyncio.sleep(580)
        async with world.app(beat_schedule=entry(schedule)).scheduler():
            await asyncio.sleep(6)

    times = [one.replace("@:", "@2026-01-01T00:00:") for one in play(act).times]
    assert times == [one.replace("@:", "@2026-01-01T00:00:") for one in expected]


def test_a_run_is_left_out_while_the_one_before_has_not_ended() -> None:
    async def act(world: World) -> None:
        app = world.app()

        @app.task(name="slow", schedule=Schedule(every(10), overlap="skip"))
        async def slow() -> None:
            await asyncio.sleep(25)

        async with entered(app.worker()), app.scheduler():
            await asyncio.sleep(75)
            (info,) = await app.schedules.list()
        assert info.skipped == 4
        assert [one.replace("slow@:", "") for one in world.times] == [
            "10Z",
            "40Z",
            "slow@2026-01-01T00:01:10Z",
        ]

    play(act)


def test_overlap_is_refused_without_results() -> None:
    async def act(world: World) -> None:
        app = world.app(task_ignore_result=True, beat_schedule=entry(10, overlap="skip"))
        await app.scheduler().run()

    with pytest.raises(ConfigError, match=r"the schedule 'one': .* keeps no results"):
        play(act)


class Hanging(Middleware):
    """Middleware that never sends the messages of one task."""

    async def send(self, message: Message, proceed: Send) -> None:
        if message.task == "hangs":
            await asyncio.Event().wait()
        if message.task == "fails":
            raise RuntimeError("this one fails")
        await proceed(message)


def test_a_send_that_hangs_or_fails_delays_no_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)

    async def act(world: World) -> None:
        app = world.app(
            middlewares=[Hanging()],
            beat_schedule={
                **{f"hangs {n}": {"task": "hangs", "schedule": 1} for n in range(20)},
                **{f"fails {n}": {"task": "fails", "schedule": 1} for n in range(15)},
                "works": {"task": "works", "schedule": 1},
            },
        )
        async with app.scheduler():
            await asyncio.sleep(20.5)
            assert world.times == [f"works@:{n:02}Z" for n in range(1, 21)]
            await asyncio.sleep(60)

    play(act)
    assert "a middleware hangs" in caplog.text
    assert "this one fails" in caplog.text


def test_a_schedule_that_failed_and_was_removed_is_forgotten() -> None:
    async def act(world: World) -> None:
        app = world.app(middlewares=[Hanging()])
        await app.schedules.add("fails", "fails", every(1))
        async with app.scheduler():
            await asyncio.sleep(5)
            await app.schedules.remove("fails")
            FarBroker.looks = 0
            await asyncio.sleep(300)
            assert FarBroker.looks <= 310

    play(act)


def test_an_impatient_scheduler_raises_when_its_broker_is_unreachable() -> None:
    async def act(world: World) -> None:
        FarBroker.away.add(world.store)
        with pytest.raises(BrokerUnavailable):
            await world.app().scheduler().run(patient=False)
        FarBroker.away.clear()

    play(act)


def test_a_run_that_failed_is_sent_after_the_failure() -> None:
    async def act(world: World) -> None:
        broken = True

        class Broken(Middleware):
            async def send(self, message: Message, proceed: Send) -> None:
                if broken:
                    raise RuntimeError
                await proceed(message)

        app = world.app(middlewares=[Broken()], beat_schedule=entry(Schedule(every(10), grace=300)))
        async with app.scheduler():
            await asyncio.sleep(45)
            broken = False
            await asyncio.sleep(60)
        assert world.times[:4] == ["one@:10Z", "one@:20Z", "one@:30Z", "one@:40Z"]

    play(act)


def test_a_store_that_is_away_is_waited_for() -> None:
    async def act(world: World) -> None:
        async with world.app(beat_schedule=entry(10)).scheduler():
            await asyncio.sleep(15)
            FarBroker.away.add(world.store)
            await asyncio.sleep(30)
            FarBroker.away.clear()
            await asyncio.sleep(10)
        assert world.times == ["one@:10Z", "one@:20Z", "one@:30Z", "one@:40Z", "one@:50Z"]

    play(act)


def test_a_paused_schedule_sends_nothing_until_it_is_resumed() -> None:
    async def act(world: World) -> None:
        app = world.app(beat_schedule=entry(10))
        async with app.scheduler():
            await asyncio.sleep(15)
            paused = await app.schedules.pause("one")
            assert (paused.paused, paused.next_at) == (True, None)
            await asyncio.sleep(20)
        async with world.app(
            beat_schedule=entry(10)
        ).scheduler():  # a deployment does not resume it
            await asyncio.sleep(10)
            resumed = await app.schedules.resume("one")
            assert resumed.next_at == datetime.fromtimestamp(BEGIN + 50, UTC)
            await asyncio.sleep(10)

    assert play(act).times == ["one@:10Z", "one@:50Z"]


def test_run_now_sends_it_once_more_and_changes_nothing() -> None:
    async def act(world: World) -> None:
        app = world.app(beat_schedule=entry(100, args=[1]))
        async with app.scheduler():
            await asyncio.sleep(1)
            before = await app.schedules.get("one")
            handle = await app.schedules.run_now("one")
            assert await app.schedules.get("one") == before
        assert [one.id for one in world.sent] == [handle.id]

    play(act)


def test_single_runs_made_at_run_time_are_removed_after_their_run() -> None:
    async def act(world: World) -> None:
        app = world.app()
        async with app.scheduler():
            # A naive time is in the time zone of the schedule, which is an hour ahead.
            when = Schedule(at(datetime(2026, 1, 1, 1, 0, 30)), timezone=OSLO.key)
            await app.schedules.add("once", "t", when)
            await asyncio.sleep(29)
            assert world.sent == []
            await asyncio.sleep(2)
            assert world.times == ["once@:30Z"]
            assert await app.schedules.get("once") is None

    play(act)


def test_schedules_made_at_run_time_are_noticed_within_a_second() -> None:
    async def act(world: World) -> None:
        app = world.app()
        async with app.scheduler():
            await asyncio.sleep(100.3)
            await app.schedules.add("new", "t", every(0.1))
            await asyncio.sleep(1.1)
            assert world.sent

    play(act)


def test_wrong_schedules_are_refused_with_advice() -> None:
    async def act(world: World) -> None:
        app = world.app()

        @app.task(name="add")
        async def add(x: int) -> None: ...

        await app.schedules.add("there", add.s(1), 10)
        with pytest.raises(ConfigError, match=r"there is a schedule 'there' already.*replace=True"):
            await app.schedules.add("there", add.s(1), 10)
        replaced = await app.schedules.add("there", add.s(2), 20, replace=True)
        assert (replaced.args, replaced.when) == ([2], "every 20 s")
        with pytest.raises(TypeError, match="missing a required argument: 'x'"):
            await app.schedules.add("other", add, 10)
        with pytest.raises(ConfigError, match="there is no schedule 'x'; there are: 'there'"):
            await app.schedules.pause("x")
        with pytest.raises(ConfigError, match="there is no schedule 'x'"):
            await app.schedules.run_now("x")
        options = {"eta": datetime(2026, 1, 1)}
        with pytest.raises(ConfigError, match="eta makes no sense for a schedule"):
            await app.schedules.add("y", "t", Schedule(10, options=options))
        assert await app.schedules.remove("x") is False

    play(act)


def test_schedules_of_the_code_and_of_run_time_do_not_replace_each_other() -> None:
    async def act(world: World) -> None:
        app = world.app(beat_schedule=entry(10))
        with pytest.raises(ConfigError, match="'one' stands in the code"):
            await app.schedules.add("one", "t", 10)
        async with app.scheduler():
            await asyncio.sleep(1)
        other = world.app()
        with pytest.raises(ConfigError, match="'one' stands in the code"):
            await other.schedules.add("one", "t", 10, replace=True)
        await other.schedules.add("hand", "t", 10)
        declares_it = world.app(beat_schedule={"hand": {"task": "t", "schedule": 10}})
        with pytest.raises(ConfigError, match="of one that was made at run time: rename one"):
            await declares_it.scheduler().run()
        broker = MemoryBroker(store=world.store)
        theirs = TaskQueue("theirs", broker=broker, beat_schedule=entry(10))
        with pytest.raises(ConfigError, match="of one of the application 'app': rename one"):
            await theirs.scheduler().run()

    play(act)


@pytest.mark.parametrize(
    "never", [at(datetime(2025, 1, 1)), Schedule(10, end=datetime(2025, 1, 1))]
)
def test_a_schedule_that_would_never_run_is_refused(never: Any) -> None:
    async def act(world: World) -> None:
        with pytest.raises(ConfigError, match="'late' would never run"):
            await world.app().schedules.add("late", "t", never)

    play(act)


def test_an_unreadable_schedule_hides_no_other() -> None:
    async def act(world: World) -> None:
        app = world.app()
        await app.schedules.add("good", "t", 10)
        odd = StoredSchedule(id="odd", body=b"{}", due_at=BEGIN, revision="r")
        assert await (await app.broker()).schedules().compare_and_swap("odd", None, odd)
        async with app.scheduler():
            await asyncio.sleep(15)
        good, odd_info = await app.schedules.list()
        assert (good.runs, odd_info.task) == (1, "")
        assert "remove it and add it again" in odd_info.when
        assert await app.schedules.remove("odd")

    play(act)


def test_a_schedule_whose_next_run_lies_beyond_the_calendar_hides_no_other() -> None:
    async def act(world: World) -> None:
        app = world.app()
        await app.schedules.add("good", "t", 10)
        await app.schedules.add("odd", "t", Schedule(10, jitter=5.0))
        store = (await app.broker()).schedules()
        (odd,) = await store.load(["odd"])
        body = odd.body.replace(b'"jitter":5.0', b'"jitter":1e18')
        changed = StoredSchedule(id="odd", body=body, due_at=None, revision="r")
        assert await store.compare_and_swap("odd", odd.revision, changed)
        good, shown = await app.schedules.list()
        assert (good.task, shown.task) == ("t", "")
        assert shown.when.startswith("the stored schedule 'odd' cannot be shown: ")
        assert await app.schedules.get("odd") == shown

    play(act)


def test_changing_a_schedule_in_an_unreachable_store_raises() -> None:
    async def act(world: World) -> None:
        app = world.app()
        FarBroker.away.add(world.store)
        with pytest.raises(BrokerUnavailable):
            await app.schedules.add("x", "t", crontab())
        FarBroker.away.clear()

    play(act)
