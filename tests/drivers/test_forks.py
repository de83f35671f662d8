"""Forks while drivers are imported, in programs of their own."""

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
        timeout=280,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def test_hooks_of_a_driver_whose_import_a_fork_waits_for_are_called() -> None:
    program = """
        import os, threading
        from aiotaskq.drivers.common import forks

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
