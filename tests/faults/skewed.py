"""The command line of aiotaskq, or a producer, in a process whose clock is wrong.

``python -m tests.faults.skewed producer PLAN`` is the latter.

``AIOTASKQ_TESTS_FAULTS_SKEW`` says by how many seconds; with ``now+3600`` it jumps by an hour when
the file ``jump`` appears in the ledger's folder. Limits: what Python reads by `time.time` is
shifted, in this process and in those that it forks. `datetime.now`, which only says when a result
was stored, and the C code of SQLite are not; no driver asks either for the time.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

_JUMP = Path(os.environ.get("AIOTASKQ_TESTS_FAULTS_LEDGER", ".")) / "jump"


def skew(given: str) -> None:
    """Let `time.time` be wrong from now on."""
    jumps = given.startswith("now")
    seconds = float(given.removeprefix("now"))
    right = time.time

    def wrong() -> float:
        return right() + (seconds if not jumps or _JUMP.exists() else 0.0)

    time.time = wrong


if __name__ == "__main__":
    skew(os.environ["AIOTASKQ_TESTS_FAULTS_SKEW"])
    if sys.argv[1] == "producer":
        del sys.argv[1]
        from tests.faults import producer

        asyncio.run(producer.main())
    else:
        from aiotaskq.cli import main

        main()
