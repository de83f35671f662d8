"""Processes as the operating system has them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import pytest

from aiotaskq.forks import STOP_SIGNALS
from aiotaskq.processes import operating_system
from aiotaskq.processes.operating_system import (
    describe_exit_status,
    is_running,
    own_resident_memory,
    resident_memory,
    start_process,
    wait_for,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def report_signals(pipe: Connection) -> None:
    """Send how the stop signals are handled here, and which are blocked; then wait."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    pipe.send(([signal.getsignal(number) for number in STOP_SIGNALS], list(blocked)))
    time.sleep(600)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_process_begins_with_signals_of_its_own_and_tells_how_it_ended(ignored: bool) -> None:
    pipe, childs_end = multiprocessing.Pipe(duplex=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    process = start_process(
        report_signals,
        (childs_end,),
        name="test",
        ignore_stop_signals=ignored,
        daemon=True,
        spawn=True,
    )
    childs_end.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    handlers, blocked = pipe.recv()
    assert handlers == [signal.SIG_IGN if ignored else signal.SIG_DFL] * len(STOP_SIGNALS)
    assert not set(blocked) & set(STOP_SIGNALS)
    assert process.is_alive()
    process.send_signal(signal.SIGKILL)
    process.join(120)
    assert not process.is_alive()
    process.send_signal(signal.SIGKILL)  # it has ended: nothing is sent
    assert process.collect() == -signal.SIGKILL
    pipe.close()


def fork_and_wait(pipe: Connection) -> None:
    """Fork a child that holds all that is open here, and send its pid; then wait."""
    child = os.fork()
    if not child:
        time.sleep(600)
    pipe.send(child)
    time.sleep(600)


def start_waiting(pipe: Connection) -> None:
    """Have a child in the same process group which may have children, and send its pid."""
    os.setpgrp()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    pipe.send(child.pid)
    time.sleep(600)


@pytest.fixture(params=["pidfd", "none"])
def with_pidfds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with pidfds and without them."""
    if request.param == "none":
        monkeypatch.setattr(operating_system, "open_pidfd", lambda pid: None)


@pytest.mark.usefixtures("with_pidfds")
def test_the_end_of_a_process_is_seen_while_a_fork_of_it_lives() -> None:
    pipe, childs_end = multiprocessing.Pipe(duplex=False)
    process = start_process(fork_and_wait, (childs_end,), name="test", daemon=True)
    fork = pipe.recv()
    assert process.is_alive()
    process.send_signal(signal.SIGKILL)
    wait_for([], [process], 20)
    assert not process.is_alive()
    os.kill(fork, 0)  # it lives
    assert process.collect() == -signal.SIGKILL
    assert not process.is_alive()
    os.kill(fork, signal.SIGKILL)
    pipe.close()
    childs_end.close()


@pytest.mark.usefixtures("with_pidfds")
def test_a_wait_ends_with_its_timeout_or_when_something_can_be_read() -> None:
    pipe, childs_end = multiprocessing.Pipe(duplex=False)
    process = start_process(time.sleep, (600,), name="test", daemon=True)
    wait_for([pipe], [process], 0.01)
    assert not pipe.poll()
    childs_end.send(1)
    wait_for([pipe], [process], None)
    assert process.is_alive()
    process.send_signal(signal.SIGKILL)
    assert process.collect() == -signal.SIGKILL
    pipe.close()
    childs_end.close()


@pytest.mark.usefixtures("with_pidfds")
def test_the_end_of_a_process_is_seen_though_other_code_has_waited_for_it() -> None:
    process = start_process(os._exit, (3,), name="test")
    os.waitpid(process.pid, 0)
    assert not process.is_alive()
    process.send_signal(signal.SIGKILL)  # to nobody
    assert process.collect() is None


def test_a_daemon_may_have_children_and_its_group_ends_with_it() -> None:
    pipe, childs_end = multiprocessing.Pipe(duplex=False)
    process = start_process(start_waiting, (childs_end,), name="test", daemon=True)
    child = pipe.recv()
    process.signal_group(signal.SIGKILL)
    assert process.collect() == -signal.SIGKILL
    process.signal_group(signal.SIGKILL)  # to nobody
    end = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.01)
    pipe.close()
    childs_end.close()


def test_a_child_leaves_the_processes_of_its_parent_alone() -> None:
    program = """
import os, sys, time
from aiotaskq.processes.operating_system import start_process
process = start_process(time.sleep, (600,), name="test", daemon=True)
child = os.fork()
if child == 0:
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), process.is_alive())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("5 True\n", "")


def test_dead_processes_of_others_are_freed_and_our_own_are_not() -> None:
    program = """
import os
from aiotaskq.processes.operating_system import reap_orphans
reap_orphans(set())
children = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(3)]
for child in children:
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
reap_orphans(children)
assert os.waitpid(children.pop(), 0)
reap_orphans(set())
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("none is left")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("none is left\n", "")


def test_a_program_that_leaves_a_daemon_behind_exits_at_once() -> None:
    program = """
import signal, sys, time
from aiotaskq.processes.operating_system import start_process
def sleep():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    print("sleeping", flush=True)
    time.sleep(600)
process = start_process(sleep, (), name="test", daemon=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "sleeping\n"
        running.communicate("\n", timeout=30)


def test_how_a_process_ended_is_told_in_words() -> None:
    assert describe_exit_status(3) == "ended with exit status 3"
    assert describe_exit_status(None) == "ended with an exit status that other code has taken"
    assert describe_exit_status(-9) == "was killed by signal 9 (Killed)"


@linux
def test_this_process_runs_and_uses_memory_and_no_other_does() -> None:
    assert is_running(os.getpid())
    assert not is_running(2**22 + 1)  # no such pid
    assert own_resident_memory() > 2**20
    assert resident_memory(os.getpid()) is not None
    assert resident_memory(2**22 + 1) is None
