"""Processes as the operating system has them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection, wait

import pytest

from aiotaskq.processes.operating_system import (
    STOP_SIGNALS,
    describe_exit_status,
    is_running,
    own_resident_memory,
    resident_memory,
    start_process,
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
    assert wait([process.sentinel], timeout=120)
    process.join(120)
    process.send_signal(signal.SIGKILL)  # it has ended: nothing is sent
    assert process.collect() == -signal.SIGKILL
    pipe.close()


def test_how_a_process_ended_is_told_in_words() -> None:
    assert describe_exit_status(3) == "ended with exit status 3"
    assert describe_exit_status(-9) == "was killed by signal 9 (Killed)"


@linux
def test_this_process_runs_and_uses_memory_and_no_other_does() -> None:
    assert is_running(os.getpid())
    assert not is_running(2**22 + 1)  # no such pid
    assert own_resident_memory() > 2**20
    assert resident_memory(os.getpid()) is not None
    assert resident_memory(2**22 + 1) is None
