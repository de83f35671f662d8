"""The pools of a worker at their limits: no more threads, no more processes, and their end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from aiotaskq import Retry, TaskQueue, TaskStatus
from aiotaskq.worker import process_pool, thread_pool
from aiotaskq.worker.process_pool import ProcessPool
from aiotaskq.worker.thread_pool import ThreadPool
from tests.worker.events import LONG


class ThreadQuota:
    """Lets a pool of threads start so many more threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left
        self.refused = 0
        start = ThreadPool._add_thread

        def add_thread(pool: ThreadPool) -> None:
            if not self.left:
                self.refused += 1
                raise RuntimeError("can't start new thread")
            self.left -= 1
            start(pool)

        monkeypatch.setattr(ThreadPool, "_add_thread", add_thread)


async def test_a_function_without_a_thread_of_its_own_waits_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quota = ThreadQuota(monkeypatch, 1)
    pool = ThreadPool(2)
    go = threading.Event()
    first, second = pool.run(go.wait, LONG), pool.run(threading.get_ident)
    assert quota.refused
    go.set()
    assert await first
    assert await second
    await pool.close()


async def test_a_thread_that_could_not_be_started_is_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thread_pool, "_START_PAUSE", 0.01)
    quota = ThreadQuota(monkeypatch, 1)
    pool = ThreadPool(2)
    go = threading.Event()
    first, second = pool.run(go.wait, LONG), pool.run(threading.get_ident)
    assert quota.refused
    quota.left = 1
    await asyncio.wait_for(second, LONG)
    assert not first.done()
    go.set()
    await first
    await pool.close()


def do_nothing() -> None:
    """Be a task of both pools."""


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_a_task_for_which_no_thread_can_be_started_is_tried_again(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch, executor: Any
) -> None:
    quota = ThreadQuota(monkeypatch, 0)

    job = app.task(executor=executor, retry=Retry(max_attempts=2, delay=0.01))(do_nothing)
    async with app.worker():
        outcome = await (await job.kiq()).wait(LONG)
    assert outcome.status is TaskStatus.FAILURE
    assert "can't start new thread" in str(outcome.error)
    assert quota.refused == 2
    [letter] = await app.dead.list()
    assert "failed 2 times" in letter.reason


class IdleProcess:
    """Stands in for a process of the pool."""

    made: list[IdleProcess]

    def __init__(self, *_: object) -> None:
        self.modules: Any = set()
        self.ended = False
        self.made.append(self)

    def alive(self) -> bool:
        return not self.ended

    def kill(self) -> None:
        pass

    def end(self, wait: float = 0.0) -> None:
        self.ended = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[IdleProcess]:
    """The processes that pools make in a test."""
    monkeypatch.setattr(process_pool, "_Process", IdleProcess)
    monkeypatch.setattr(IdleProcess, "made", [], raising=False)
    return IdleProcess.made


@pytest.mark.may_block
async def test_no_process_is_started_while_the_loop_looks_at_an_idle_one(
    made: list[IdleProcess],
) -> None:
    pool = ProcessPool(2, {}, worker="w")
    process: Any = pool._take()
    pool._put_back(process)
    taken: list[Any] = []
    other = threading.Thread(target=lambda: taken.append(pool._take()))

    class Modules:
        def __contains__(self, module: object) -> bool:
            if threading.current_thread() is not other:
                other.start()
                other.join(0.3)  # it must not get on now
            return False

    process.modules = Modules()
    assert pool._take_ready("module") is None
    other.join()
    assert taken == made == [process]
    await pool.close()


@pytest.mark.may_block
async def test_a_process_that_is_put_back_while_the_pool_closes_is_ended(
    made: list[IdleProcess],
) -> None:
    looked, closed = threading.Event(), threading.Event()

    class SlowPool(ProcessPool):
        """A pool that closes between a look whether it is closed and what follows from it."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "_closed" and threading.current_thread().name == "other":
                looked.set()
                closed.wait(0.3)  # it must not get so far now
            return value

    pool = SlowPool(2, {}, worker="w")
    process: Any = pool._take()
    other = threading.Thread(target=lambda: pool._put_back(process), name="other")
    other.start()
    looked.wait()
    await pool.close()
    closed.set()
    other.join()
    assert made == [process]
    assert made[0].ended
