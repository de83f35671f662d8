"""The waiters: all wait for their outcomes over one subscription."""

from __future__ import annotations

import asyncio
import gc
import logging
import warnings
from collections.abc import AsyncIterator, Collection, Mapping, Sequence

import pytest

from aiotaskq.client.waiters import Waiters
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.errors import BackendUnavailable, ConfigError, DecodeError, Unavailable
from tests.unit.client.drivers import RecordingBackend, outcome, until


@pytest.fixture
async def backend() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture
async def waiters(backend: RecordingBackend) -> AsyncIterator[Waiters]:
    waiters = Waiters(backend)
    yield waiters
    await waiters.close()


async def test_many_wait_over_one_subscription(backend: RecordingBackend, waiters: Waiters) -> None:
    waiting = [asyncio.create_task(waiters.wait(str(n % 50))) for n in range(100)]
    await until(lambda: backend.subscriptions)
    await backend.store([outcome(str(n)) for n in range(50)], None)
    found = await asyncio.gather(*waiting)
    assert [one.task_id for one in found] == [str(n % 50) for n in range(100)]
    assert backend.subscriptions == 1


async def test_an_outcome_that_is_there_is_found_at_once(
    backend: RecordingBackend, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.waiters._SAFETY_LOOK", 1000)
    backend.deaf = True
    await backend.store([outcome("1"), outcome("2")], None)
    async with asyncio.timeout(120):
        assert (await waiters.wait("1")).task_id == "1"
        assert (await waiters.wait("2")).task_id == "2"


async def test_no_outcome_is_lost_between_the_look_and_the_push(
    backend: RecordingBackend, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.waiters._SAFETY_LOOK", 1000)

    async def one(task_id: str, turns: int) -> None:
        waiting = asyncio.create_task(waiters.wait(task_id))
        for _ in range(turns):  # store at every moment in the life of a wait
            await asyncio.sleep(0)
        await backend.store([outcome(task_id)], None)
        async with asyncio.timeout(120):
            await waiting

    for turns in range(20):
        await one(f"alone {turns}", turns)
    await asyncio.gather(*[one(f"together {turns}", turns) for turns in range(20)])


async def test_an_outcome_that_is_not_final_does_not_end_the_wait(
    backend: RecordingBackend, waiters: Waiters
) -> None:
    await backend.store([outcome("1", TaskStatus.RETRY)], None)
    waiting = asyncio.create_task(waiters.wait("1"))
    await until(lambda: backend.loads)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await backend.store([outcome("1")], None)
    assert (await waiting).status is TaskStatus.SUCCESS


async def test_a_lost_push_is_noticed_though_other_outcomes_keep_arriving(
    backend: RecordingBackend, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.waiters._SAFETY_LOOK", 0.05)
    backend.deaf = True
    lost = asyncio.create_task(waiters.wait("lost"))
    await until(lambda: backend.loads)
    await backend.store([outcome("lost")], None)

    async def stay_busy() -> None:
        n = 0
        while True:  # each of these causes a load
            n += 1
            await backend.store([outcome(str(n))], None)
            await waiters.wait(str(n))

    busy = asyncio.create_task(stay_busy())
    try:
        async with asyncio.timeout(120):
            await lost
    finally:
        busy.cancel()
        await asyncio.wait([busy])


async def test_waiting_goes_on_after_an_outage_of_the_backend(
    backend: RecordingBackend, waiters: Waiters, caplog: pytest.LogCaptureFixture
) -> None:
    backend.load_errors = [BackendUnavailable("away"), BackendUnavailable("away")]
    await backend.store([outcome("1")], None)
    with caplog.at_level(logging.WARNING, "aiotaskq.session"):
        assert (await waiters.wait("1")).task_id == "1"
    assert "cannot look for results" in caplog.text


@pytest.mark.parametrize("where", ["load", "subscribe"])
async def test_a_configuration_error_raises_in_all_waiters_and_the_next_one_tries_again(
    backend: RecordingBackend, waiters: Waiters, where: str
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
    backend: RecordingBackend, waiters: Waiters
) -> None:
    cancelled, other = [asyncio.create_task(waiters.wait("1")) for _ in range(2)]
    await until(lambda: backend.loads)
    cancelled.cancel()
    await backend.store([outcome("1")], None)
    assert (await other).task_id == "1"
    assert cancelled.cancelled() or await asyncio.wait([cancelled])
    assert waiters._waiting == {}


async def test_closing_leaves_no_task_and_no_subscription(backend: RecordingBackend) -> None:
    waiters = Waiters(backend)
    waiting = asyncio.create_task(waiters.wait("1"))
    await until(lambda: backend.loads)
    before = asyncio.all_tasks()
    await waiters.close()
    await asyncio.wait([waiting])
    assert isinstance(
        waiting.exception(), BackendUnavailable
    )  # it gets an error, and is not cancelled
    assert backend.unsubscribed == backend.subscriptions == 1
    assert asyncio.all_tasks() == before & {asyncio.current_task()}


async def test_closing_before_anything_has_begun_leaves_no_warning(
    backend: RecordingBackend,
) -> None:
    waiters = Waiters(backend)
    waiting = asyncio.create_task(waiters.wait("1"))
    await asyncio.sleep(0)  # its tasks are created, and have not begun
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await waiters.close()
        with pytest.raises(BackendUnavailable, match="closed"):
            await waiting
        del waiters, waiting
        gc.collect()


async def test_an_outcome_that_cannot_be_read_fails_only_its_own_waiters(
    backend: RecordingBackend, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
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


class FailingSubscription(RecordingBackend):
    """A backend whose first subscriptions fail, each after the items that a test gives for it."""

    def __init__(self, *scripts: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.scripts = list(scripts)
        self.lasts = 0.0  # seconds between the items and the failure

    async def subscribe(self) -> AsyncIterator[Sequence[str]]:
        if not self.scripts:
            async for ids in super().subscribe():
                yield ids
            return
        for ids in self.scripts.pop(0):
            yield ids
        await asyncio.sleep(self.lasts)
        raise OSError("it failed")


async def failures_told(backend: FailingSubscription, caplog: pytest.LogCaptureFixture) -> int:
    """Wait until a subscription holds; return the number of failures in the log."""
    waiters = Waiters(backend)
    waiting = asyncio.create_task(waiters.wait("1"))
    await until(lambda: backend.subscriptions)
    await waiters.close()
    await asyncio.wait([waiting])
    return caplog.text.count("waiting for results failed")


async def test_the_first_failure_after_news_is_told_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = FailingSubscription([], [], [[], ["x"]], [], [])
    assert await failures_told(backend, caplog) == 2


async def test_a_subscription_that_only_begins_counts_as_no_success(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert await failures_told(FailingSubscription([[]], [[]], [[]]), caplog) == 1


async def test_a_failure_after_a_long_quiet_time_is_told_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.waiters._PAUSES", (0.001, 0.001))
    backend = FailingSubscription([[]], [[]])
    backend.lasts = 0.05
    assert await failures_told(backend, caplog) == 2


async def test_the_first_failure_after_a_look_that_went_well_is_told_again(
    backend: RecordingBackend, waiters: Waiters, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        backend.load_errors = [Unavailable("of another kind"), Unavailable("again")]
        await backend.store([outcome(str(number))], None)
        assert (await waiters.wait(str(number))).task_id == str(number)
    assert caplog.text.count("waiting for results failed") == 2
