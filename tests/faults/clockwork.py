"""The application of `test_schedulers.py`: each second a task that records its id."""

from __future__ import annotations

import os
from pathlib import Path

from aiotaskq import TaskQueue, current_task, every

RAN = Path(os.environ.get("AIOTASKQ_TESTS_FAULTS_LEDGER", ".")) / "ran"

app = TaskQueue("clockwork")


@app.task(name="tick", schedule=every(1))
async def tick() -> None:
    with RAN.open("a") as ran:
        ran.write(f"{current_task().id}\n")
