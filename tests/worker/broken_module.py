"""A task in a module that cannot be imported in a process of the pool."""

from __future__ import annotations

import multiprocessing
import sys

from tests.worker.process_tasks import app

if multiprocessing.parent_process() is not None:
    sys.exit("no licence")


@app.task(executor="process")
def unreachable() -> int:
    return 1
