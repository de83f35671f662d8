"""A task in a module that takes longer to import, in a process of the pool, than its task may."""

from __future__ import annotations

import multiprocessing
import os
import time

from tests.worker.process_tasks import app

LIMIT = 1.0  # seconds

if multiprocessing.parent_process() is not None:
    time.sleep(2 * LIMIT)


@app.task(executor="process", timeout=LIMIT, soft_timeout=LIMIT / 2)
def quick() -> int:
    return os.getpid()
