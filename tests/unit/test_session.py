"""What one event loop needs to send tasks and to wait for them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path

import pytest
from msgspec import Raw

from aiotaskq.client.publisher import Publisher
from aiotaskq.client.session import Session
from aiotaskq.client.waiters import Waiters
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker
from aiotaskq.errors import BackendUnavailable, BrokerUnavailable, ConfigError, DecodeError

ROOT = Path(__file__).parents[2]


class Broker(MemoryBroker):
    """A broker that can be slow or away, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[str], str | None]] = []
        self.errors: list[Exception] = []  # raised by the next calls, after storing
        self.gate: asyncio.Event | None = None
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        self.calls.append(([one.id for one in batch], call_id))
        if self.gate is not None:
            await self.gate.wait()
        refused = await super().publish(batch, call_id=call_id)
        if self.errors:
            raise self.errors.pop(0)
        return refused


class Backend(MemoryBackend):
    """A backend that can be away, deaf, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.subscriptions = 0
        self.unsubscribed = 0
        self.loads: list[set[str]] = []
        self.load_errors: list[Exception] = []
        self.arrival_error: Exception | None = None
        self.deaf = False
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        self.loads.append(set(ids))
        await asyncio.sleep(0)
        if self.load_errors:
            raise self.load_errors.pop(0)
        return await super().load(ids)

    async def subscribe(self) -> AsyncIterator[Sequence[str]]:
        self.subscriptions += 1
        try:
            await asyncio.sleep(0)
            if self.arrival_error is not None:
                raise self.arrival_error
            if self.deaf:
                yield []
                await asyncio.Event().wait()
            arrivals = super().subscribe()
            try:
                async for ids in arrivals:
                    yield ids
            finally:
                await arrivals.aclose()  # type: ignore[attr-defined]  # a generator
        finally:
            self.unsubscribed += 1


def envelope(name: str, size: int = 1) -> Envelope:
    return Envelope(id=name, queue="q", body=b"x" * size)


def outcome(task_id: str, status: TaskStatus = TaskStatus.SUCCESS) -> Outcome:
    return Outcome(task_id=task_id, status=status, result=Raw(b"1"))


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


# --- the publisher ------------------------------------------------------------------------------


async def test_callers_that_come_while_a_call_is_under_way_share_the_next() -> None:
    broker = Broker()
    broker.gate = asyncio.Event()
    publisher = Publisher(broker, 5)
    first = asyncio.create_task(publisher.publish([envelope("first")]))
    await until(lambda: broker.calls)
    others = [asyncio.create_task(publisher.publish([envelope(str(n))])) for n in range(100)]
    await asyncio.sleep(0)
    broker.gate.set()
    await asyncio.gather(first, *others)
    assert [ids for ids, _ in broker.calls] == [["first"], [str(n) for n in range(100)]]


async def test_a_lone_caller_is_sent_at_once() -> None:
    broker = Broker()
    publisher = Publisher(broker, 5)
    for n in range(3):
        await publisher.publish([envelope(str(n))])
    assert len(broker.calls) == 3


async def test_one_call_stays_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotaskq.client.publisher._ROUND", 10)
    monkeypatch.setattr("aiotaskq.client.publisher._ROUND_BYTES", 100)
    broker = Broker()
    publisher = Publisher(broker, 5)
    batches = [
        [envelope(f"a{n}") for n in range(25)],  # more than fit, from one caller
        [envelope("b0"), envelope("b1")],
        [envelope("c", 90)],
        [envelope("d", 500)],
        *[[envelope(f"e{n}")] for n in range(12)],
    ]
    await asyncio.gather(*[publisher.publish(batch) for batch in batches])
    assert [len(ids) for ids, _ in broker.calls] == [25, 3, 1, 10, 2]
    stored = await broker.depth()
    assert stored["q"].ready == 41


async def test_a_repeat_after_a_lost_reply_has_the_same_call_id_and_stores_once() -> None:
    broker = Broker()
    broker.errors = [BrokerUnavailable("lost"), BrokerUnavailable("lost")]
    publisher = Publisher(broker, 30)
    await publisher.publish([envelope("1")])
    ids = {call_id for _, call_id in broker.calls}
    assert len(broker.calls) == 3
    assert len(ids) == 1
    assert None not in ids
    assert (await broker.depth())["q"].ready == 1
    await publisher.publish([envelope("2")])
    assert broker.calls[-1][1] not in ids


async def test_a_broker_that_stays_away_is_told_to_every_caller() -> None:
    broker = Broker()
    broker.errors = [BrokerUnavailable("away")] * 1000
    publisher = Publisher(broker, 0.2)
    done = await asyncio.gather(
        *[publisher.publish([envelope(str(n))]) for n in range(3)], return_exceptions=True
    )
    assert [type(error) for error in done] == [BrokerUnavailable] * 3
    broker.errors = []
    await publisher.publish([envelope("later")])


async def test_an_error_that_no_repeat_helps_is_told_at_once() -> None:
    broker = Broker()
    broker.errors = [ConfigError("wrong password")]
    with pytest.raises(ConfigError):
        await Publisher(broker, 1000).publish([envelope("1")])
    assert len(broker.calls) == 1


async def test_a_cancelled_caller_does_not_hurt_the_others() -> None:
    broker = Broker()
    broker.gate = asyncio.Event()
    publisher = Publisher(broker, 5)
    first, second, third = [
        asyncio.create_task(publisher.publish([envelope(str(n))])) for n in range(3)
    ]
    await until(lambda: broker.calls)
    late = asyncio.create_task(publisher.publish([envelope("late")]))
    await asyncio.sleep(0)
    first.cancel()
    broker.gate.set()
    assert list(await second) == list(await third) == list(await late) == []
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_closing_waits_for_what_is_being_sent() -> None:
    broker = Broker()
    broker.gate = asyncio.Event()
    publisher = Publisher(broker, 5)
    sending = asyncio.create_task(publisher.publish([envelope("1")]))
    await until(lambda: broker.calls)
    closing = asyncio.create_task(publisher.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    broker.gate.set()
    await closing
    await sending


# --- the waiters --------------------------------------------------------------------------------


@pytest.fixture
async def backend() -> Backend:
    return Backend()


@pytest.fixture
async def waiters(backend: Backend) -> AsyncIterator[Waiters]:
    waiters = Waiters(backend)
    yield waiters
    await waiters.close()


async def test_many_wait_over_one_subscription(backend: Backend, waiters: Waiters) -> None:
    waiting = [asyncio.create_task(waiters.wait(str(n % 50))) for n in range(100)]
    await until(lambda: backend.subscriptions)
    await backend.store([outcome(str(n)) for n in range(50)], None)
    found = await asyncio.gather(*waiting)
    assert [one.task_id for one in found] == [str(n % 50) for n in range(100)]
    assert backend.subscriptions == 1


async def test_an_outcome_that_is_there_is_found_at_once(
    backend: Backend, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.waiters._SAFETY_LOOK", 1000)
    backend.deaf = True
    await backend.store([outcome("1"), outcome("2")], None)
    async with asyncio.timeout(30):
        assert (await waiters.wait("1")).task_id == "1"
        assert (await waiters.wait("2")).task_id == "2"


async def test_no_outcome_is_lost_between_the_look_and_the_push(
    backend: Backend, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.waiters._SAFETY_LOOK", 1000)

    async def one(task_id: str, turns: int) -> None:
        waiting = asyncio.create_task(waiters.wait(task_id))
        for _ in range(turns):  # store at every moment in the life of a wait
            await asyncio.sleep(0)
        await backend.store([outcome(task_id)], None)
        async with asyncio.timeout(30):
            await waiting

    for turns in range(20):
        await one(f"alone {turns}", turns)
    await asyncio.gather(*[one(f"together {turns}", turns) for turns in range(20)])


async def test_an_outcome_that_is_not_final_does_not_end_the_wait(
    backend: Backend, waiters: Waiters
) -> None:
    await backend.store([outcome("1", TaskStatus.RETRY)], None)
    waiting = asyncio.create_task(waiters.wait("1"))
    await until(lambda: backend.loads)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await backend.store([outcome("1")], None)
    assert (await waiting).status is TaskStatus.SUCCESS


async def test_a_lost_push_is_made_up_for_however_busy_it_is(
    backend: Backend, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.waiters._SAFETY_LOOK", 0.05)
    backend.deaf = True
    lost = asyncio.create_task(waiters.wait("lost"))
    await until(lambda: backend.loads)
    await backend.store([outcome("lost")], None)

    async def stay_busy() -> None:
        n = 0
        while True:  # each of these wakes the loading
            n += 1
            await backend.store([outcome(str(n))], None)
            await waiters.wait(str(n))

    busy = asyncio.create_task(stay_busy())
    try:
        async with asyncio.timeout(30):
            await lost
    finally:
        busy.cancel()
        await asyncio.wait([busy])


async def test_a_backend_that_is_away_for_a_while_is_waited_out(
    backend: Backend, waiters: Waiters, caplog: pytest.LogCaptureFixture
) -> None:
    backend.load_errors = [BackendUnavailable("away"), BackendUnavailable("away")]
    await backend.store([outcome("1")], None)
    with caplog.at_level(logging.WARNING, "aiotaskq.session"):
        assert (await waiters.wait("1")).task_id == "1"
    assert "cannot look for results" in caplog.text


@pytest.mark.parametrize("where", ["load", "subscribe"])
async def test_a_wrong_set_up_is_told_to_all_who_wait_and_the_next_tries_anew(
    backend: Backend, waiters: Waiters, where: str
) -> None:
    wrong = ConfigError("wrong password")
    if where == "load":
        backend.load_errors = [wrong]
    else:
        backend.arrival_error = wrong
    done = await asyncio.gather(*[waiters.wait(str(n)) for n in range(3)], return_exceptions=True)
    assert done == [wrong] * 3
    backend.arrival_error = None
    await backend.store([outcome("1")], None)
    assert (await waiters.wait("1")).task_id == "1"


async def test_a_cancelled_waiter_is_forgotten_and_the_others_go_on(
    backend: Backend, waiters: Waiters
) -> None:
    cancelled, other = [asyncio.create_task(waiters.wait("1")) for _ in range(2)]
    await until(lambda: backend.loads)
    cancelled.cancel()
    await backend.store([outcome("1")], None)
    assert (await other).task_id == "1"
    assert cancelled.cancelled() or await asyncio.wait([cancelled])
    assert waiters._waiting == {}


async def test_closing_leaves_no_task_and_no_subscription(backend: Backend) -> None:
    waiters = Waiters(backend)
    waiting = asyncio.create_task(waiters.wait("1"))
    await until(lambda: backend.loads)
    before = asyncio.all_tasks()
    await waiters.close()
    await asyncio.wait([waiting])
    assert isinstance(waiting.exception(), BackendUnavailable)  # told, and not cancelled
    assert backend.unsubscribed == backend.subscriptions == 1
    assert asyncio.all_tasks() == before & {asyncio.current_task()}


async def test_closing_before_anything_has_begun_leaves_no_warning(backend: Backend) -> None:
    waiters = Waiters(backend)
    waiting = asyncio.create_task(waiters.wait("1"))
    await asyncio.sleep(0)  # its tasks are made, and have not begun
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await waiters.close()
        with pytest.raises(BackendUnavailable, match="closed"):
            await waiting
        del waiters, waiting
        gc.collect()


# --- the session --------------------------------------------------------------------------------


async def test_who_only_sends_needs_no_result_server() -> None:
    broker, backend = Broker(), Backend()
    session = Session(broker, backend, publish_timeout=5)
    await session.open()
    await session.publisher.publish([envelope("1")])
    assert (broker.opened, backend.opened) == (1, 0)
    await session.close()
    assert broker.closed == 1


async def test_each_driver_is_opened_once_however_many_ask() -> None:
    broker, backend = Broker(), Backend()
    session = Session(broker, backend, publish_timeout=5)
    await asyncio.gather(*[session.open() for _ in range(9)], *[session.results() for _ in "abc"])
    assert (broker.opened, backend.opened) == (1, 1)
    await session.close()
    assert (broker.closed, backend.closed) == (1, 1)


async def test_it_closes_though_nothing_ran_since_it_was_opened() -> None:
    broker = Broker()
    session = Session(broker, None, publish_timeout=5)
    await session.open()
    await session.close()
    await session.close()
    assert broker.closed == 1


async def test_an_open_that_failed_is_tried_again() -> None:
    class Away(Broker):
        async def open(self) -> None:
            await super().open()
            if self.opened == 1:
                raise BrokerUnavailable("away")

    broker = Away()
    session = Session(broker, None, publish_timeout=0)
    with pytest.raises(BrokerUnavailable):
        await session.open()
    await session.open()
    assert broker.opened == 2
    await session.close()


async def test_opening_is_as_patient_as_sending() -> None:
    class Away(Broker):
        async def open(self) -> None:
            await super().open()
            if self.opened < 3:
                raise BrokerUnavailable("away")

    broker = Away()
    session = Session(broker, None, publish_timeout=60)
    await session.open()
    assert broker.opened == 3
    await session.close()


async def test_an_outcome_that_cannot_be_read_fails_only_its_own_waiters(
    backend: Backend, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = backend.load

    async def picky(ids: Collection[str]) -> Mapping[str, Outcome]:
        if "bad" in ids:
            raise DecodeError("no outcome")
        return await load(ids)

    monkeypatch.setattr(backend, "load", picky)
    await backend.store([outcome("1"), outcome("2")], None)
    names = ("1", "bad", "2")
    one, bad, two = await asyncio.gather(
        *(waiters.wait(name) for name in names), return_exceptions=True
    )
    assert isinstance(bad, DecodeError)
    assert isinstance(one, Outcome)
    assert isinstance(two, Outcome)


async def test_without_a_backend_waiting_is_a_config_error() -> None:
    session = Session(Broker(), None, publish_timeout=5)
    with pytest.raises(ConfigError, match="keeps no results"):
        await session.wait("1")
    assert not session.keeps_results


def test_the_end_of_the_loop_closes_it_after_all_tasks() -> None:
    broker, backend = Broker(), Backend()
    closed_before_the_last_send: list[int] = []

    async def main() -> None:
        session = Session(broker, backend, publish_timeout=5)
        await session.open()

        async def linger() -> None:
            try:
                await session.wait("never")
            finally:
                closed_before_the_last_send.append(broker.closed)
                await session.publisher.publish([envelope("last")])

        kept.append(asyncio.create_task(linger()))
        await until(lambda: backend.loads)

    kept: list[asyncio.Task[None]] = []
    asyncio.run(main())
    assert closed_before_the_last_send == [0]
    assert (broker.closed, backend.closed) == (1, 1)
    assert broker.calls[-1][0] == ["last"]


@pytest.mark.parametrize("url", ["memory://", "sqlite:///q.db"])
@pytest.mark.parametrize(
    "ending",
    [
        "asyncio.run(main())",
        "asyncio.run(main()); asyncio.run(main())",
        "uvloop.run(main())",
    ],
)
def test_a_program_without_async_with_says_nothing(tmp_path: Path, url: str, ending: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import asyncio, gc
            import uvloop
            from aiotaskq import ResultTimeout, TaskQueue
            app = TaskQueue("t", broker="{url}")

            @app.task
            async def add(x: int, y: int) -> int:
                return x + y

            async def main():
                handle = await add.kiq(2, 8)
                try:
                    await handle.result(timeout=0.05)
                except ResultTimeout:
                    print("waited")
                forgotten.append(asyncio.ensure_future(handle.result()))
                await asyncio.sleep(0.05)

            forgotten = []
            {ending}
            del forgotten
            gc.collect()
            """
        )
    )
    assert run(program) == "waited\n" * ending.count("run(")


def test_a_loop_that_is_closed_by_hand_says_nothing_after_a_send(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import asyncio, gc
            from aiotaskq import TaskQueue
            app = TaskQueue("t", broker="memory://")
            for _ in range(3):
                loop = asyncio.new_event_loop()
                loop.run_until_complete(app.send("x"))
                loop.close()
                del loop
                gc.collect()
            """
        )
    )
    assert run(program) == ""


def run(program: Path) -> str:
    """Run a program in which every warning is an error; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", str(program)],
        cwd=program.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout
