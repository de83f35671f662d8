"""Further attempts: by the options of a task, or at its own request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aiotaskq import (
    Reject,
    Retry,
    RetryLater,
    Snooze,
    Task,
    TaskFailed,
    TaskQueue,
    TaskStatus,
    current_task,
)
from aiotaskq.events import Failed, Retried, Snoozed, Succeeded
from aiotaskq.worker import Worker
from tests.worker import retry_tasks
from tests.worker.events import LONG, EventRecorder

# --- bound tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loop", "thread"])
async def test_a_bound_task_knows_its_run_and_tries_again(app: TaskQueue, where: str) -> None:
    seen: list[Any] = []

    def body(self: Task[..., Any], x: int) -> int:
        seen.append(self.request)
        if self.request.retries < 2:
            raise self.retry(exc=ValueError(f"not with {x}"), countdown=0)
        return x

    @app.task(bind=True, name="loop")
    async def coroutine(self: Task[..., Any], x: int, *, y: int = 0) -> int:
        return body(self, x + y)

    @app.task(bind=True, name="thread")
    def plain(self: Task[..., Any], x: int, *, y: int = 0) -> int:
        return body(self, x + y)

    job = coroutine if where == "loop" else plain
    async with app.worker(name="w"):
        handle = await job.with_options(priority=3, headers={"a": "b"}).kiq(4, y=1)
        ended = await handle.wait(LONG)
    assert ended.value() == 5
    assert [request.retries for request in seen] == [0, 1, 2]
    last = seen[-1]
    assert (last.id, last.task, last.hostname) == (handle.id, where, "w")
    assert (last.args, last.kwargs, last.headers) == ((4,), {"y": 1}, {"a": "b"})
    assert last.delivery_info == {"routing_key": "default", "priority": 3}
    assert not last.called_directly
    assert [attempt.number for attempt in ended.history] == [1, 2]
    assert {attempt.error for attempt in ended.history} == {"ValueError: not with 5"}


@pytest.mark.parametrize("where", ["loop", "thread", "process"])
@pytest.mark.parametrize("how", ["returned", "hidden", "followed by an error"])
async def test_a_retry_that_was_asked_for_comes_even_if_it_is_not_raised(
    app: TaskQueue, where: str, how: str
) -> None:
    @app.task(bind=True, name="loop")
    async def coroutine(self: Task[..., Any], how: str) -> int:
        return retry_tasks.ask(self, how)

    @app.task(bind=True, name="thread")
    def plain(self: Task[..., Any], how: str) -> int:
        return retry_tasks.ask(self, how)

    if where == "process":
        retry_tasks.app.conf.worker_process_pool_size = 1
        async with retry_tasks.app.worker():
            ended = await (await retry_tasks.asks.kiq(how)).wait(LONG)
        await retry_tasks.app.close()
    else:
        async with app.worker():
            ended = await (await (coroutine if where == "loop" else plain).kiq(how)).wait(LONG)
    assert (ended.value(), ended.attempts) == (2, 2)
    assert len(ended.history) == 1


async def test_when_the_retries_are_used_up_the_error_itself_is_the_end(app: TaskQueue) -> None:
    @app.task(bind=True, max_retries=2, default_retry_delay=0)
    async def job(self: Task[..., Any], given: bool) -> None:
        try:
            raise OSError("away")
        except OSError as error:
            self.retry(exc=error if given else None)

    async with app.worker():
        known = await (await job.kiq(True)).wait(LONG)
        unknown = await (await job.kiq(False)).wait(LONG)
    assert (known.attempts, len(known.history)) == (3, 2)
    assert isinstance(known.error, OSError)
    assert isinstance(unknown.error, TaskFailed)
    assert unknown.error.exc_type == "MaxRetriesExceededError"
    assert "has had its 3 attempts" in str(unknown.error)
    assert unknown.attempts == 3


async def test_the_task_may_ask_for_more_than_its_options_say(app: TaskQueue) -> None:
    @app.task(bind=True)
    async def job(self: Task[..., Any]) -> int:
        if self.request.retries < 5:
            raise self.retry(countdown=0, max_retries=5)
        return self.request.retries

    async with app.worker():
        assert await (await job.kiq()).result(LONG) == 5


async def test_a_call_may_ask_for_fewer(app: TaskQueue) -> None:
    @app.task(bind=True, max_retries=None, default_retry_delay=0)
    async def job(self: Task[..., Any]) -> None:
        raise self.retry(exc=OSError("away"))

    async with app.worker():
        asked = job.with_options(retry=Retry(max_attempts=2, delay=0))
        assert (await (await asked.kiq()).wait(LONG)).attempts == 2


# --- options of Celery --------------------------------------------------------------------------


async def test_autoretry_for_tries_again_after_its_exceptions(app: TaskQueue) -> None:
    @app.task(
        autoretry_for=(OSError,),
        dont_autoretry_for=(FileNotFoundError,),
        max_retries=2,
        default_retry_delay=0,
    )
    async def job(kind: str) -> None:
        raise {"os": OSError, "file": FileNotFoundError, "value": ValueError}[kind]

    async with app.worker():
        for kind, attempts in (("os", 3), ("file", 1), ("value", 1)):
            assert (await (await job.kiq(kind)).wait(LONG)).attempts == attempts


async def test_without_autoretry_for_nothing_is_tried_again_by_itself(app: TaskQueue) -> None:
    @app.task(max_retries=5, default_retry_delay=0)
    async def job() -> None:
        raise OSError

    async with app.worker():
        assert (await (await job.kiq()).wait(LONG)).attempts == 1


async def test_the_default_of_the_application_holds_without_other_options(app: TaskQueue) -> None:
    app.conf.task_default_retry = Retry(max_attempts=3, delay=0)

    async def fail() -> None:
        raise OSError

    unsaid = app.task(name="unsaid")(fail)
    once = app.task(name="once", retry=Retry(max_attempts=1))(fail)
    async with app.worker():
        assert (await (await unsaid.kiq()).wait(LONG)).attempts == 3
        assert (await (await once.kiq()).wait(LONG)).attempts == 1


# --- requests of the task itself ----------------------------------------------------------------


async def test_a_task_without_a_retry_may_ask_to_run_later(app: TaskQueue) -> None:
    retried = EventRecorder(app, Retried)

    @app.task
    async def job() -> int:
        if current_task().attempt < 3:
            raise RetryLater(0, "the other side is asleep")
        return current_task().attempt

    async with app.worker():
        ended = await (await job.kiq()).wait(LONG)
        assert len(await retried.count(2)) == 2
    assert ended.value() == 3
    assert ["asleep" in attempt.error for attempt in ended.history] == [True, True]


async def test_without_attempts_left_the_cause_of_the_request_is_the_error(
    app: TaskQueue,
) -> None:
    @app.task
    async def job() -> None:
        try:
            raise KeyError("gone")
        except KeyError as error:
            raise RetryLater(0) from error

    async with app.worker():
        ended = await (await job.kiq()).wait(LONG)
        (letter,) = await (await app.broker()).dead("default")
    assert isinstance(ended.error, KeyError)
    assert ended.attempts == 3
    assert letter.id == ended.task_id


async def test_a_task_may_run_again_without_a_limit(app: TaskQueue) -> None:
    @app.task
    async def job() -> int:
        if current_task().attempt < 30:
            raise RetryLater(0, max_attempts=math.inf)
        return len(current_task().history)

    async with app.worker():
        ended = await (await job.kiq()).wait(LONG)
    numbers = [attempt.number for attempt in ended.history]
    assert ended.attempts == 30
    assert ended.value() == len(numbers)
    assert numbers == list(range(30 - len(numbers), 30))  # the latest of many


async def test_a_snooze_is_no_attempt(app: TaskQueue) -> None:
    snoozed = EventRecorder(app, Snoozed)
    runs: list[int] = []

    @app.task(retry=Retry(max_attempts=1))
    async def job() -> int:
        runs.append(current_task().attempt)
        if len(runs) < 4:
            raise Snooze(0, "not open yet")
        return current_task().attempt

    async with app.worker():
        ended = await (await job.kiq()).wait(LONG)
        assert len(await snoozed.count(3)) == 3
    assert runs == [1, 1, 1, 1]
    assert (ended.value(), ended.attempts, ended.history) == (1, 1, ())


async def test_a_rejected_task_is_kept_and_not_tried_again(app: TaskQueue) -> None:
    failed = EventRecorder(app, Failed)

    @app.task(retry=Retry(max_attempts=5, delay=0))
    async def job(customer: int) -> None:
        raise Reject(f"no customer {customer}")

    async with app.worker():
        ended = await (await job.kiq(7)).wait(LONG)
        await failed.count(1)
        (letter,) = await (await app.broker()).dead("default")
    assert type(ended.error) is TaskFailed
    assert "no customer 7" in str(ended.error)
    assert ended.attempts == 1
    assert (letter.id, letter.reason) == (ended.task_id, "no customer 7")
    assert app.codec.decode_message(letter.body).id == ended.task_id


async def test_a_task_that_asks_wrongly_fails_in_that_line(app: TaskQueue) -> None:
    @app.task(retry=Retry(max_attempts=1))
    async def job() -> None:
        raise Snooze("tomorrow")  # type: ignore[arg-type]  # that is the point

    async with app.worker():
        ended = await (await job.kiq()).wait(LONG)
    assert isinstance(ended.error, TypeError)
    assert "'tomorrow'" in str(ended.error)


async def test_a_delayed_attempt_waits_in_the_store_and_can_be_cancelled(app: TaskQueue) -> None:
    @app.task(bind=True)
    async def job(self: Task[..., Any]) -> None:
        raise self.retry(countdown=3600)

    async with app.worker():
        handle = await job.kiq()
        broker = await app.broker()
        async with asyncio.timeout(LONG):
            while (await broker.depth())["default"].delayed == 0:
                await asyncio.sleep(0.005)
        await app.cancel(handle.id, running=False)
        assert (await handle.wait(LONG)).status is TaskStatus.REVOKED
    depth = (await (await app.broker()).depth()).get("default")
    assert depth is None or (depth.ready, depth.held) == (0, 0)


# --- processes ----------------------------------------------------------------------------------


@pytest.fixture
async def processes() -> AsyncIterator[Worker]:
    """A worker with a process in its pool."""
    retry_tasks.app.conf.worker_process_pool_size = 1
    async with retry_tasks.app.worker(grace_period=LONG, name="w") as worker:
        yield worker
    await retry_tasks.app.close()


@pytest.mark.timeout(400)  # a process may take long to start on a busy machine
async def test_tasks_in_processes_have_the_same_requests(processes: Worker, tmp_path: Path) -> None:
    handle = await retry_tasks.twice.kiq(4)
    ended = await handle.wait(LONG)
    assert ended.value() == [handle.id, 1, "w", 4]
    assert [attempt.error for attempt in ended.history] == ["ValueError: not with 4"]

    used_up = await (await retry_tasks.never.kiq()).wait(LONG)
    assert isinstance(used_up.error, KeyError)
    assert used_up.attempts == 2

    assert await (await retry_tasks.later.kiq()).result(LONG) == 3
    assert await (await retry_tasks.snooze.kiq(str(tmp_path / "marker"))).result(LONG) == 1

    rejected = await retry_tasks.reject.kiq()
    assert "no such customer" in str((await rejected.wait(LONG)).error)
    letters = await (await retry_tasks.app.broker()).dead("default")
    assert [letter.reason for letter in letters if letter.id == rejected.id] == ["no such customer"]


async def test_a_failed_task_runs_again_until_it_succeeds(app: TaskQueue) -> None:
    recorded = EventRecorder(app, Retried, Succeeded, Failed)
    attempts: list[int] = []

    @app.task(retry=Retry(max_attempts=5, delay=0))
    async def job() -> str:
        attempts.append(current_task().attempt)
        if len(attempts) < 3:
            raise OSError("not yet")
        return "done"

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert outcome.return_value == "done"
    assert outcome.attempts == 3
    assert attempts == [1, 2, 3]
    assert recorded.names == ["Retried", "Retried", "Succeeded"]


async def test_a_task_fails_after_its_last_attempt(app: TaskQueue) -> None:
    attempts = 0

    @app.task(retry=Retry(max_attempts=3, delay=0))
    def job() -> None:
        nonlocal attempts
        attempts += 1
        raise OSError("never")

    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert isinstance(outcome.error, OSError)
    assert outcome.attempts == attempts == 3


async def test_the_status_between_two_attempts_is_retry(app: TaskQueue) -> None:
    recorded = EventRecorder(app, Retried)

    @app.task(retry=Retry(max_attempts=2, delay=3600))
    async def job() -> None:
        raise OSError("no")

    async with app.worker():
        handle = await job.kiq()
        await recorded.count(1)
        while await handle.status() is not TaskStatus.RETRY:
            await asyncio.sleep(0.001)
        depth = (await (await app.broker()).depth())["default"]
        assert depth.delayed == 1


async def test_exceptions_that_are_not_retried_end_the_task(app: TaskQueue) -> None:
    @app.task(retry=Retry(max_attempts=3, delay=0, on=(OSError,), never_on=(FileNotFoundError,)))
    async def job(kind: str) -> None:
        raise {"os": OSError, "file": FileNotFoundError, "value": ValueError}[kind]

    async with app.worker():
        for kind, attempts in (("os", 3), ("file", 1), ("value", 1)):
            assert (await (await job.kiq(kind)).wait(LONG)).attempts == attempts


async def test_a_backoff_that_fails_costs_no_attempt(app: TaskQueue) -> None:
    def wrong(attempt: int) -> float:
        raise RuntimeError("a mistake of the user's")

    @app.task(retry=Retry(max_attempts=3, backoff=wrong, max_delay=0))
    async def mistaken() -> None:
        raise OSError

    async with app.worker():
        assert (await (await mistaken.kiq()).wait(LONG)).attempts == 3


async def test_a_call_may_ask_for_other_attempts_than_the_task(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        raise OSError

    async with app.worker():
        handle = await job.with_options(retry=Retry(max_attempts=4, delay=0)).kiq()
        assert (await handle.wait(LONG)).attempts == 4
