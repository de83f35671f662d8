"""Plain functions in a pool of processes: arguments, results, deaths and time limits."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from aiotaskq import TaskFailed, TaskHandle, TaskRevoked, TaskStatus
from aiotaskq.events import Succeeded
from aiotaskq.worker import Worker, process_pool
from tests.worker import process_tasks as tasks
from tests.worker.events import LONG, until

pytestmark = pytest.mark.timeout(400)  # a process may take long to start on a busy machine


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    """A worker with two processes."""
    tasks.app.conf.worker_process_pool_size = 2
    async with tasks.app.worker(grace_period=LONG) as worker:
        yield worker
    await tasks.app.close()


async def pid_of(started: Path) -> int:
    await until(lambda: started.exists() and started.read_text() != "")
    return int(started.read_text())


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid)


async def test_tasks_run_in_another_process_which_is_used_again(worker: Worker) -> None:
    first = await (await tasks.whoami.kiq()).result(LONG)
    second = await (await tasks.whoami.kiq()).result(LONG)
    assert first == second != os.getpid()


async def test_a_task_in_a_process_has_its_arguments_and_its_context(worker: Worker) -> None:
    handle = await tasks.about_me.kiq(1, y=[2, 3])
    expected = [handle.id, 1, [1], {"y": [2, 3]}, worker.options.name]
    assert await handle.result(LONG) == expected


async def test_large_payloads_pass_both_ways(worker: Worker) -> None:
    data = "x" * 450_000
    assert await (await tasks.double.kiq(data)).result(LONG) == data * 2
    error = (await (await tasks.double.kiq("x" * 900_000)).wait(LONG)).error
    assert isinstance(error, TaskFailed)
    assert error.exc_type == "PayloadTooLarge"


async def test_a_failure_carries_its_type_and_the_traceback_there(worker: Worker) -> None:
    outcome = await (await tasks.fail.kiq("no")).wait(LONG)
    assert isinstance(outcome.error, ValueError)
    assert outcome.traceback is not None
    assert "raise ValueError(text)" in outcome.traceback


async def test_a_result_without_a_form_fails_the_task(worker: Worker) -> None:
    error = (await (await tasks.odd.kiq()).wait(LONG)).error
    assert isinstance(error, TaskFailed)
    assert error.exc_type == "EncodeError"


async def test_exiting_fails_the_task_and_the_process_goes_on(worker: Worker) -> None:
    before = await (await tasks.whoami.kiq()).result(LONG)
    error = (await (await tasks.exit_politely.kiq()).wait(LONG)).error
    assert isinstance(error, TaskFailed)
    assert error.exc_type == "SystemExit"
    assert await (await tasks.whoami.kiq()).result(LONG) == before


async def test_a_death_fails_the_task_that_ran_and_the_next_one_works(
    worker: Worker, tmp_path: Path
) -> None:
    bystander = await tasks.sleep.kiq(1, str(tmp_path / "started"))
    pid = await pid_of(tmp_path / "started")
    for handle, reason in (
        (await tasks.die.kiq(signal.SIGKILL), r"by signal 9 \(Killed\)"),
        (await tasks.die.kiq(signal.SIGSEGV), "by signal 11"),
        (await tasks.die.kiq(signal.SIGRTMIN + 5), "by signal"),
        (await tasks.leave.kiq(7), "with exit status 7"),
    ):
        with pytest.raises(TaskFailed, match=f"ended under it, {reason}"):
            await handle.result(LONG)
    assert await (await tasks.whoami.kiq()).result(LONG) != os.getpid()
    assert await bystander.result(LONG) == pid


async def test_a_death_may_be_worth_another_attempt(worker: Worker, tmp_path: Path) -> None:
    assert await (await tasks.die_once.kiq(str(tmp_path / "died"))).result(LONG) == 2


async def test_a_process_that_dies_while_idle_costs_no_task(worker: Worker) -> None:
    idle = await (await tasks.whoami.kiq()).result(LONG)
    os.kill(idle, signal.SIGKILL)
    process = psutil.Process(idle)
    await until(lambda: process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1)
    assert await (await tasks.whoami.kiq()).result(LONG) != idle


async def test_a_timeout_ends_the_process_and_only_that_one(worker: Worker, tmp_path: Path) -> None:
    bystander = await tasks.sleep.kiq(6, str(tmp_path / "one"))
    spared = await pid_of(tmp_path / "one")
    # The start of its process counts, and may take long on a busy machine.
    handle = await tasks.sleep.with_options(timeout=4).kiq(LONG, str(tmp_path / "two"))
    doomed = await pid_of(tmp_path / "two")
    with pytest.raises(TaskFailed, match="longer than its timeout"):
        await handle.result(LONG)
    await until(lambda: gone(doomed))
    assert await bystander.result(LONG) == spared
    assert await (await tasks.whoami.kiq()).result(LONG) != doomed


async def test_a_soft_limit_is_raised_in_the_process_and_not_in_the_next_task(
    worker: Worker,
) -> None:
    limited = tasks.told_or.with_options(soft_timeout=0.05)
    told = await (await limited.kiq(LONG)).result(LONG)
    assert told == "it ran longer than its soft_timeout of 0.05 s"
    assert await (await tasks.told_or.kiq(0.1)).result(LONG) == "in time"
    tasks.app.conf.task_soft_time_limit = 0.06
    try:
        told = await (await tasks.told_or.kiq(LONG)).result(LONG)
        assert told == "it ran longer than its soft_timeout of 0.06 s"
    finally:
        tasks.app.conf.task_soft_time_limit = None


async def test_a_setting_has_plain_functions_run_in_processes(worker: Worker) -> None:
    assert await (await tasks.anywhere.kiq()).result(LONG) == os.getpid()
    tasks.app.conf.task_default_executor = "process"
    try:
        assert await (await tasks.anywhere.kiq()).result(LONG) != os.getpid()
    finally:
        tasks.app.conf.task_default_executor = "thread"


async def test_a_cancelled_task_loses_its_process_and_only_that_one(
    worker: Worker, tmp_path: Path
) -> None:
    bystander = await tasks.sleep.kiq(2, str(tmp_path / "one"))
    spared = await pid_of(tmp_path / "one")
    handle = await tasks.sleep.kiq(LONG, str(tmp_path / "two"))
    doomed = await pid_of(tmp_path / "two")
    await handle.cancel()
    await until(lambda: gone(doomed))
    with pytest.raises(TaskRevoked):
        await handle.result(LONG)
    assert await bystander.result(LONG) == spared


async def test_a_task_cancelled_while_its_process_starts_never_runs(
    worker: Worker, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    handle = await tasks.sleep.kiq(LONG, str(started))
    await until(lambda: worker.running == 1)
    worker._incarnation._executor.revoke([handle.id])  # type: ignore[union-attr]  # it runs
    await until(lambda: worker.running == 0)
    await (await tasks.whoami.kiq()).result(LONG)
    assert await handle.status() is TaskStatus.REVOKED
    assert not started.exists()


async def test_a_timeout_begins_when_a_process_is_free(worker: Worker, tmp_path: Path) -> None:
    await asyncio.gather(*[(await tasks.whoami.kiq()).result(LONG) for _ in range(2)])
    waiting: list[TaskHandle[int]] = [
        await tasks.sleep.with_options(timeout=2.5).kiq(1, str(tmp_path / str(n))) for n in range(8)
    ]
    for handle in waiting:  # the last ones wait for 3 s
        await handle.result(LONG)


async def test_a_task_must_be_found_by_its_name(worker: Worker) -> None:
    with pytest.raises(TypeError, match="must be bound to its own name"):
        await (await tasks.unbound.kiq()).result(LONG)


async def test_no_process_outlives_the_worker(tmp_path: Path) -> None:
    tasks.app.conf.worker_process_pool_size = 2
    async with tasks.app.worker(grace_period=0):
        idle = await (await tasks.whoami.kiq()).result(LONG)
        await tasks.sleep.kiq(LONG, str(tmp_path / "started"))
        busy = await pid_of(tmp_path / "started")
        assert busy == idle
        other = await (await tasks.whoami.kiq()).result(LONG)
    assert gone(busy)
    assert gone(other)
    # It was released, for another worker.
    assert (await (await tasks.app.broker()).depth())["default"].ready == 1
    await (await tasks.app.broker()).purge("default")
    await tasks.app.close()


async def test_a_task_may_have_processes_of_its_own(worker: Worker) -> None:
    assert await (await tasks.spread.kiq([-1, 2])).result(LONG) == [1, 2, 1, 2]


async def test_programs_that_a_task_starts_begin_with_signals_of_their_own(worker: Worker) -> None:
    assert await (await tasks.interrupt.kiq()).result(LONG) == -signal.SIGINT
    assert await (await tasks.blocked.kiq()).result(LONG) == []


@pytest.mark.parametrize("name", ["speak", "speak_in_thread", "speak_in_loop"])
async def test_context_variables_do_not_pass_from_one_task_to_the_next(
    worker: Worker, name: str
) -> None:
    tasks.app.conf.worker_process_pool_size = 1
    task = getattr(tasks, name)
    assert [await (await task.kiq(word)).result(LONG) for word in ("no", "de")] == ["en", "en"]


async def test_a_child_that_comes_back_ends_alone(worker: Worker) -> None:
    assert await (await tasks.fork_and_exit.kiq(7)).result(LONG) == 7
    assert await (await tasks.fork_and_exit.kiq(0)).result(LONG) == 0


async def test_the_start_and_the_imports_of_a_process_are_outside_the_time_limits(
    worker: Worker,
) -> None:
    from tests.worker import slow_module

    handles = [await slow_module.quick.kiq() for _ in range(4)]
    pids = [await handle.result(LONG) for handle in handles]
    assert os.getpid() not in pids
    # A process that has the module is taken before one that has not.
    others = [await tasks.whoami.kiq() for _ in range(2)]
    await asyncio.gather(*[other.result(LONG) for other in others])
    assert await (await slow_module.quick.kiq()).result(LONG) in pids


async def test_an_import_that_fails_fails_the_task_and_says_why(worker: Worker) -> None:
    from tests.worker import broken_module

    for _ in range(2):
        outcome = await (await broken_module.unreachable.kiq()).wait(LONG)
        assert isinstance(outcome.error, ImportError)
        assert "broken_module of the task cannot be imported" in str(outcome.error)
        assert "SystemExit: no licence" in str(outcome.error)
    assert await (await tasks.whoami.kiq()).result(LONG) != os.getpid()


async def test_a_process_that_is_not_ready_in_time_fails_the_task(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_pool, "_IMPORT_LIMIT", 0.05)
    with pytest.raises(TaskFailed, match=r"not ready within 0\.05 s"):
        await (await tasks.whoami.kiq()).result(LONG)


async def test_a_signal_to_the_process_group_leaves_the_pool_to_the_worker(
    worker: Worker, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    handle = await tasks.sleep.kiq(0.5, str(started))
    pid = await pid_of(started)
    os.kill(pid, signal.SIGTERM)
    assert await handle.result(LONG) == pid


async def test_a_plain_function_around_a_coroutine_function_runs_its_body(worker: Worker) -> None:
    assert await (await tasks.wrapped.kiq(4)).result(LONG) == 5


async def test_a_value_without_a_form_is_no_reason_to_run_again(
    worker: Worker, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    outcome = await (await tasks.odd_again.kiq(str(runs))).wait(LONG)
    assert isinstance(outcome.error, TaskFailed)
    assert outcome.error.exc_type == "EncodeError"
    assert runs.read_text() == "x"


async def test_an_ignored_value_is_not_encoded(worker: Worker) -> None:
    ended = asyncio.Event()

    def succeeded(event: Succeeded) -> None:
        if event.message.task == tasks.odd_ignored.name:
            ended.set()

    tasks.app.observers.add(Succeeded, succeeded)
    await tasks.odd_ignored.kiq()
    await asyncio.wait_for(ended.wait(), LONG)
