"""Decisions of the supervisor; `tests/integrations` has its tests with real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aiotaskq.processes.supervisor import _RestartPauses


def test_the_first_replacement_is_quick_and_pauses_grow_to_half_a_minute() -> None:
    pauses = _RestartPauses()
    assert [pauses.next(lived=1.0) for _ in range(9)] == [0.1, 0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_steady_life_makes_the_next_replacement_quick_again() -> None:
    pauses = _RestartPauses()
    assert [pauses.next(lived) for lived in (1.0, 1.0, 1.0)] == [0.1, 0.5, 1.0]
    assert pauses.next(lived=10.1) == 0.1
    assert pauses.next(lived=1.0) == 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_process_1_frees_orphans_also_while_nothing_else_happens() -> None:
    program = """
import ctypes, os, time
from aiotaskq.processes import supervisor

ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans are given to this process
supervisor.adopts_orphans = lambda: True
supervisor._ORPHAN_LOOK_INTERVAL = 0.05

def leave_an_orphan(number, replaces, pipe):
    theirs, ours = os.pipe()
    child = os.fork()
    if not child:
        orphan = os.fork()
        if orphan:
            os.write(ours, str(orphan).encode())
            os._exit(0)
        os._exit(0)
    os.waitpid(child, 0)
    orphan = int(os.read(theirs, 20))
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(orphan, 0)  # succeeds as long as it is a zombie
        except ProcessLookupError:
            os._exit(0)
        time.sleep(0.01)
    os._exit(9)

print(supervisor.Supervisor(leave_an_orphan, finite=True).run())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
