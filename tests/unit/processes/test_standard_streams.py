"""Standard streams on which no write fails, within one program each."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(program: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program that has guarded its streams."""
    text = "from aiotaskq.processes.standard_streams import *\nguard_streams()\n"
    return subprocess.run(
        [sys.executable, "-c", text + textwrap.dedent(program)],
        cwd=ROOT,
        check=False,
        timeout=280,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )


def test_characters_are_escaped_as_in_json() -> None:
    done = run(r"""
        import json, sys
        text = "é日😀\udcff"
        print(json.dumps(text, ensure_ascii=False))
        assert json.dumps(text, ensure_ascii=False) != json.dumps(text)
        print(text, file=sys.stderr)
    """)
    assert done.stdout == rb'"\u00e9\u65e5\ud83d\ude00\udcff"' + b"\n"
    assert done.returncode == 0


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_gets_everything_whether_it_blocks_or_not(blocking: bool) -> None:
    done = run(f"""
        import os, sys
        os.set_blocking(1, {blocking})
        for _ in range(3):
            print("x" * 300_000)
    """)
    assert done.stdout == (b"x" * 300_000 + b"\n") * 3
    assert (done.returncode, done.stderr) == (0, b"")


def test_writing_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run(f"""
        import os, sys
        full = os.open("/dev/full", os.O_WRONLY)
        log = os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT)
        os.dup2(full, 1)
        print("lost")
        os.dup2(log, 1)
        print("written")
        failure = output_failure()
        assert failure.strerror == "No space left on device", failure
        forgive_output()
        assert output_failure() is None
    """)
    assert (done.returncode, done.stderr) == (0, b"")
    assert log.read_text() == "written\n"


def test_the_numbers_of_closed_streams_are_given_to_nobody() -> None:
    program = "import os, sys; os.closerange(0, 3); exec(sys.argv[1])"
    inner = textwrap.dedent("""
        sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None
        from aiotaskq.processes.standard_streams import *
        guard_streams()
        assert os.open("/dev/null", os.O_RDONLY) > 2
        print("lost")
        assert output_failure().strerror == "Bad file descriptor"
        assert sys.stdin.read() == ""
        sys.exit(7)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, inner], cwd=ROOT, check=False, timeout=280
    )
    assert done.returncode == 7
