"""Forks: signals, file descriptors and the end of a child, in programs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(program: str) -> str:
    """Run a program; return its output."""
    done = subprocess.run(
        # Python 3.12 and later warn of any fork of a process with threads.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def test_hooks_of_a_driver_whose_import_a_fork_waits_for_are_called() -> None:
    program = """
        import os, threading
        from aiotaskq import forks

        called, begun, statuses = [], threading.Event(), []
        os.register_at_fork(before=begun.set)  # the last one that is registered runs first

        def fork():
            child = os.fork()
            if not child:
                os._exit(0 if called == ["before", "after"] else 1)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

        with forks.importing:
            thread = threading.Thread(target=fork)
            thread.start()
            begun.wait()
            forks.register(lambda: called.append("before"), lambda: called.append("after"))
        thread.join()
        print(called, statuses)
    """
    assert run(program) == "['before', 'after'] [0]\n"


def test_a_child_has_no_part_in_the_signals_of_the_loop_of_its_parent() -> None:
    program = """
        import asyncio, os, signal, sys, time
        import uvloop
        import aiotaskq.forks

        def own(number, frame):
            pass

        async def main():
            loop = asyncio.get_running_loop()
            seen = []
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                loop.add_signal_handler(number, seen.append, number)
            signal.signal(signal.SIGUSR2, own)
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                for delay in (0, 0.05):  # at once: before the child has done anything
                    child = os.fork()
                    if not child:
                        try:
                            assert signal.set_wakeup_fd(-1) == -1
                            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
                            assert signal.getsignal(signal.SIGUSR2) is own
                            time.sleep(20)
                        except KeyboardInterrupt:
                            os._exit(100)
                        finally:
                            os._exit(101)
                    time.sleep(delay)
                    os.kill(child, number)
                    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    if number == signal.SIGINT:
                        assert status in (100, -2)  # the latter: before it can raise anything
                    else:
                        print(status, end=" ")
            await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGTERM)  # the parent's own signals still arrive
            while not seen:
                await asyncio.sleep(0.01)
            print(seen)

        asyncio.run(main())
        uvloop.run(main())
    """
    line = "-15 -15 -10 -10 [<Signals.SIGTERM: 15>]\n"
    assert run(program) == line * 2


def test_a_child_of_a_task_ends_by_signals_that_the_program_around_it_handles() -> None:
    program = """
        import asyncio, multiprocessing, os, signal, time
        from aiotaskq import TaskQueue

        app = TaskQueue("t", broker="memory://")
        seen = []

        @app.task
        def end() -> int:
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
            process.start()
            process.terminate()
            process.join()
            return process.exitcode

        async def main():
            signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
            async with app.worker():
                print(await (await end.kiq()).result(20), seen)
            await app.close()

        asyncio.run(main())
    """
    assert run(program) == "-15 []\n"


def test_a_child_that_comes_back_from_a_task_ends_like_a_program_and_settles_nothing() -> None:
    program = """
        import asyncio, atexit, os, sys
        from aiotaskq import TaskQueue

        app = TaskQueue("t", broker="memory://")
        ends = [
            lambda: sys.exit(3), lambda: sys.exit("bye"), lambda: None, lambda: os._exit(4),
            lambda: 1 / 0,
        ]
        parent = os.getpid()
        atexit.register(lambda: print("exits", os.getpid() == parent))

        def fork(number: int) -> int:
            child = os.fork()
            if not child:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                ends[number]()
                return -1
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        @app.task
        async def in_loop(number: int) -> int:
            return fork(number)

        @app.task
        def in_thread(number: int) -> int:
            return fork(number)

        @app.task
        async def waits() -> int:
            never = asyncio.get_running_loop().create_future()
            child = os.fork()
            if not child:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                await never
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        async def main():
            async with app.worker():
                for task in (in_loop, in_thread):
                    for number in range(len(ends)):
                        end = await (await task.kiq(number)).result(20)
                        print(end, end=" ", flush=True)  # or a child would have a copy
                print(await (await waits.kiq()).result(20))
            await app.close()

        asyncio.run(main())
    """
    assert run(program) == "3 1 0 4 1 3 1 0 4 1 1\nexits True\n"


def test_a_private_file_descriptor_is_a_dead_end_in_a_child_and_others_are_not() -> None:
    program = """
        import os, socket
        from aiotaskq import forks

        ours, server = socket.socketpair()
        theirs, other = socket.socketpair()
        closed, _ = socket.socketpair()
        for own in (ours, closed):
            forks.keep_private(own.fileno())
        number = closed.detach()
        os.close(number)
        assert os.dup(theirs.fileno()) == number  # another file has the number now
        child = os.fork()
        if not child:
            try:
                ours.send(b"x")
            except BrokenPipeError:
                os.write(number, b"theirs")
                os._exit(0 if ours.recv(1) == b"" else 1)
            os._exit(2)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), other.recv(10))
        ours.send(b"mine")
        print(server.recv(10))
        child = os.fork()
        if not child:
            import time
            time.sleep(20)
            os._exit(0)
        ours.close()
        print(server.recv(10))  # the end is seen, though a child lives
        os.kill(child, 9)
    """
    assert run(program) == "0 b'theirs'\nb'mine'\nb''\n"


def test_a_fork_that_ctrl_c_interrupts_in_a_hook_gives_back_all_that_it_took() -> None:
    program = """
        import os, signal, sys, threading
        from aiotaskq import forks
        from aiotaskq.drivers.sqlite import database

        interrupted, taken, busy = threading.Event(), threading.RLock(), threading.Lock()
        begun, told = threading.Event(), []

        def wait():
            begun.set()
            busy.acquire()

        def note(unraisable):
            told.append(unraisable.exc_type.__name__)
            interrupted.set()

        def interrupt():
            begun.wait()
            os.kill(os.getpid(), signal.SIGINT)

        def are_free():
            free = []
            def look():
                locks = (taken, forks.importing, database._registering)
                free.extend(lock.acquire(timeout=20) for lock in locks)
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            return free

        sys.unraisablehook = note
        forks.register(taken.acquire, taken.release)
        forks.register(wait, lambda: told.append("not begun"))
        forks.register(in_child=lambda: told.append("in child"))
        busy.acquire()
        thread = threading.Thread(target=interrupt)
        thread.start()
        child = os.fork()
        if not child:
            os._exit(0 if are_free() == [True] * 3 and told[-1] == "in child" else 1)
        thread.join()
        assert interrupted.is_set()
        print(told, are_free(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run(program) == "['KeyboardInterrupt'] [True, True, True] 0\n"


def test_a_signal_during_the_fork_itself_leaves_nothing_taken() -> None:
    program = """
        import _thread, asyncio, concurrent.futures.thread, logging, multiprocessing, os, random
        import sys, threading

        # C code, so that the signal is handled at the first step of the next function of Python.
        os.register_at_fork(after_in_parent=_thread.interrupt_main)
        from aiotaskq import forks

        told, free = [], []
        sys.unraisablehook = lambda found: told.append((found.exc_type.__name__, found.object))
        called = []
        forks.register(lambda: called.append("before"), lambda: called.append("after"))
        child = os.fork()
        if not child:
            os._exit(0 if called == ["before", "after"] else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        thread = threading.Thread(target=lambda: free.append(forks.importing.acquire(timeout=20)))
        thread.start()
        thread.join()
        # Mostly in a hook of ours; Python may handle the signal a moment later, in another one.
        assert [name for name, _ in told] == ["KeyboardInterrupt"], told
        print(called, status, free, forks._under_way)
    """
    assert run(program) == "['before', 'after'] 0 [True] []\n"
