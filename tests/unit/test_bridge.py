"""The bridge: calls from plain code, on an event loop in a thread."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from aiotaskq import TaskQueue, TaskRevoked, bridge, native
from aiotaskq.bridge import Bridge

ROOT = Path(__file__).parents[2]


@pytest.fixture
def door() -> Iterator[Bridge]:
    bridge = Bridge()
    yield bridge
    bridge.stop()


@pytest.fixture
def stopped() -> Iterator[None]:
    """Stop the thread of the bridge after the test."""
    yield
    bridge.stop()


def script(code: str, *, folder: Path, arguments: tuple[str, ...] = ()) -> str:
    """Run a program in which every warning is an error; return its output."""
    file = folder / "program.py"
    file.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", str(file), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    # asyncio reports slow steps, which occur on a busy machine.
    told = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert told == []
    assert done.returncode == 0
    return done.stdout


def test_many_threads_share_one_loop(door: Bridge) -> None:
    async def where(number: int) -> tuple[int, int]:
        await asyncio.sleep(0)
        return number, threading.get_ident()

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: door.run(where(n), instead="x"), range(200)))
    assert [number for number, _ in found] == list(range(200))
    assert len({thread for _, thread in found}) == 1


def test_an_exception_of_the_coroutine_reaches_its_thread(door: Bridge) -> None:
    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        door.run(fail(), instead="x")


async def test_in_a_running_loop_it_says_what_to_write_instead() -> None:
    app = TaskQueue("t", broker="memory://")

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    result = app.AsyncResult("1")
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: add.delay(1, 2), "await task.kiq()"),
        (lambda: add.apply_async((1, 2)), "await task.kiq()"),
        (lambda: app.send_task("x"), "await app.send("),
        (result.get, "await handle.result()"),
        (result.ready, "await handle.status()"),
        (lambda: result.status, "await handle.status()"),
        (result.revoke, "await handle.cancel()"),
        (result.forget, "await handle.forget()"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call, instead in calls:
            with pytest.raises(RuntimeError) as refused:
                call()
            assert instead in str(refused.value)
        gc.collect()  # a coroutine that was never awaited causes a warning when it is collected


def test_it_starts_anew_after_a_stop(door: Bridge) -> None:
    async def ident() -> int:
        return threading.get_ident()

    door.run(ident(), instead="x")
    door.stop()
    door.stop()
    door.run(ident(), instead="x")


def test_a_loop_that_cannot_start_is_an_error_and_no_hang(
    door: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing() -> None: ...

    def fail() -> None:
        raise OSError("too many open files")

    complaints: list[object] = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", fail)
        with pytest.raises(RuntimeError, match="no event loop"):
            door.run(nothing(), instead="x")
    assert len(complaints) == 1
    door.run(nothing(), instead="x")


@pytest.fixture(params=["threads", "greenlets"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to wait for a call."""
    monkeypatch.setattr(native, "is_patched", lambda: request.param == "greenlets")


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
def test_a_call_that_ends_the_loop_gets_its_exception_and_the_next_one_a_new_loop(
    door: Bridge, ending: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end() -> None:
        raise ending("told")

    async def fine() -> str:
        return "fine"

    complaints: list[object] = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    for _ in range(3):
        with pytest.raises(ending, match="told"):
            door.run(end(), instead="x")
        assert door.run(fine(), instead="x") == "fine"
    door.stop()
    assert complaints == []


@pytest.mark.usefixtures("waiting")
def test_all_calls_hear_of_the_end_of_the_loop(door: Bridge) -> None:
    begun = threading.Semaphore(0)
    gate: asyncio.Event | None = None

    async def wait(ending: BaseException | None) -> None:
        nonlocal gate
        gate = gate or asyncio.Event()
        begun.release()
        try:
            await gate.wait()
            if ending is None:
                await asyncio.Event().wait()
        finally:  # of those that are cancelled, as the first one ends the loop, too
            if ending is not None:
                raise ending

    async def open_gate() -> None:
        assert gate is not None
        gate.set()

    def run(ending: BaseException | None) -> str:
        try:
            door.run(wait(ending), instead="x")
        except BaseException as error:
            return type(error).__name__
        return "nothing"

    endings = [SystemExit(1), KeyboardInterrupt(), SystemExit(2), None]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(run, one) for one in endings]
        for _ in endings:
            assert begun.acquire(timeout=60)
        door.run(open_gate(), instead="x")
        heard = [call.result(timeout=60) for call in calls]
    assert heard == ["SystemExit", "KeyboardInterrupt", "SystemExit", "CancelledError"]


@pytest.mark.usefixtures("waiting")
def test_the_default_timeout_of_sockets_does_not_end_a_call(door: Bridge) -> None:
    async def wait() -> str:
        await asyncio.sleep(0.05)  # much longer than that timeout
        return "waited"

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(1e-6)
    try:
        assert door.run(wait(), instead="x") == "waited"
    finally:
        socket.setdefaulttimeout(before)


def test_stopping_closes_open_sessions(door: Bridge) -> None:
    closed: list[str] = []

    async def leave_open() -> None:
        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                closed.append("task")

        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        kept.append(task)

    kept: list[asyncio.Task[None]] = []
    door.run(leave_open(), instead="x")
    door.stop()
    assert closed == ["task"]


def test_a_program_that_sends_and_exits_says_nothing(tmp_path: Path) -> None:
    printed = script(
        """
        from aiotaskq import TaskQueue
        app = TaskQueue("t", broker="sqlite:///q.db")

        @app.task
        def add(x: int, y: int) -> int:
            return x + y

        r = add.delay(2, 8)
        print(repr(r), r.status, r.ready(), r.result)
        """,
        folder=tmp_path,
    )
    assert printed.startswith("<AsyncResult: ")
    assert printed.endswith("PENDING False None\n")


def test_waiting_in_a_thread_of_its_own_works_at_exit_too(tmp_path: Path) -> None:
    printed = script(
        """
        import atexit, threading
        from aiotaskq import TaskQueue
        app = TaskQueue("t", broker="sqlite:///q.db")
        threads = [threading.Thread(target=app.send_task, args=("x",)) for _ in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print("sent")
        """,
        folder=tmp_path,
    )
    assert printed == "sent\n"


def test_a_thread_that_outlives_the_main_one_can_still_send(tmp_path: Path) -> None:
    printed = script(
        """
        import threading, time
        from aiotaskq import TaskQueue
        app = TaskQueue("t", broker="memory://")

        def go_on():
            threading.main_thread().join()
            for _ in range(20):
                app.send_task("x")
                time.sleep(0.001)
            print("sent")

        app.send_task("x")
        threading.Thread(target=go_on).start()
        """,
        folder=tmp_path,
    )
    assert printed == "sent\n"


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit()"])
def test_a_forked_child_and_its_parent_can_both_send(tmp_path: Path, end: str) -> None:
    printed = script(
        f"""
        import os, sys
        from aiotaskq import TaskQueue
        app = TaskQueue("t", broker="sqlite:///q.db")
        before = app.send_task("parent").id
        child = os.fork()
        if child == 0:
            inside = app.send_task("child").id
            assert app.AsyncResult(inside).status == "PENDING"
            {end}
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        after = app.send_task("parent").id
        assert app.AsyncResult(before).status == "PENDING"

        import asyncio
        async def count():
            async with app:
                return (await (await app.broker()).depth())["default"].ready
        print(asyncio.run(count()))
        """,
        folder=tmp_path,
    )
    assert printed == "3\n"


def test_a_child_forked_while_a_loop_runs_can_send(tmp_path: Path) -> None:
    printed = script(
        """
        import asyncio, os
        from aiotaskq import TaskQueue
        app = TaskQueue("t", broker="sqlite:///q.db")

        async def main():
            await app.send("parent")
            child = os.fork()
            if child == 0:
                try:
                    app.send_task("child")
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            await app.send("parent")
            return (await (await app.broker()).depth())["default"].ready
        print(asyncio.run(main()))
        """,
        folder=tmp_path,
    )
    assert printed == "3\n"


@contextmanager
def working(app: TaskQueue) -> Iterator[None]:
    """Run a worker in a thread."""
    ready, done = threading.Event(), threading.Event()

    def work() -> None:
        async def main() -> None:
            async with app.worker():
                ready.set()
                await asyncio.to_thread(done.wait)

        asyncio.run(main())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(120)
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.usefixtures("stopped")
def test_plain_code_sees_the_whole_life_of_a_task() -> None:
    app = TaskQueue("t", broker="memory://")

    @app.task
    def divide(x: int, y: int) -> float:
        return x / y

    first = divide.delay(1, 2)
    assert (first.status, first.state, first.ready(), first.result) == (
        "PENDING",
        "PENDING",
        False,
        None,
    )
    with pytest.raises(TimeoutError):
        first.get(timeout=0.01)
    revoked = divide.delay(1, 3)
    revoked.revoke()
    with working(app):
        assert first.get(timeout=120) == 0.5
        assert (first.status, first.ready(), first.successful(), first.result) == (
            "SUCCESS",
            True,
            True,
            0.5,
        )
        failed = divide.apply_async((1, 0), queue="default")
        with pytest.raises(ZeroDivisionError):
            failed.get(timeout=120)
        assert isinstance(failed.get(propagate=False), ZeroDivisionError)
        assert failed.failed()
        assert "ZeroDivisionError" in (failed.traceback or "")
        assert revoked.status == "REVOKED"
        assert app.AsyncResult(first.id) == first
        first.forget()
        assert first.status == "PENDING"


@pytest.mark.usefixtures("stopped")
def test_a_task_that_runs_is_only_ended_when_asked_to() -> None:
    app = TaskQueue("t", broker="memory://")
    running, go = threading.Semaphore(0), threading.Event()

    @app.task
    async def wait() -> str:
        running.release()
        await asyncio.to_thread(go.wait)
        return "to its end"

    with working(app):
        left, ended = wait.delay(), wait.delay()
        for _ in range(2):
            assert running.acquire(timeout=120)
        left.revoke()
        ended.revoke(terminate=True, signal="SIGKILL")
        with pytest.raises(TaskRevoked):
            ended.get(timeout=120)
        go.set()
        assert left.get(timeout=120) == "to its end"
        delayed = wait.apply_async(countdown=3600)
        delayed.revoke()
        assert delayed.status == "REVOKED"
