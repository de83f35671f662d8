"""The command line of aiotaskq, or a producer, in a process whose clock is wrong.

``python -m tests.faults.skewed producer PLAN`` is the producer.

``AIOTASKQ_TESTS_FAULTS_SKEW`` is the number of seconds; with ``now+3600`` the clock jumps by an
hour when the file ``jump`` appears in the folder of the ledger. Only `time.time` is shifted, in
this process and in its forks. `datetime.now`, which dates stored results, and the C code of SQLite
are not shifted; no driver reads the time from either.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

_JUMP = Path(os.environ.get("AIOTASKQ_TESTS_FAULTS_LEDGER", ".")) / "jump"


def skew(given: str) -> None:
    """Shift `time.time` from now on."""
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
