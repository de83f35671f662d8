"""``python -m tests.faults.producer PLAN``: sends tasks at a rate, and records each attempt.

The plan is JSON, see `Plan`. SIGTERM ends the producer after the call that is under way.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from aiotaskq import Call, TaskQueue
from aiotaskq.errors import BrokerUnavailable
from tests.faults.later import app
from tests.faults.ledger import Acknowledged, Attempted, Finished, Refused, Writer


class Some(msgspec.Struct, frozen=True):
    """Some tasks of one kind.

    Args:
        task: The last part of its name, such as ``quick``.
        count: The number of tasks.
        values: Its arguments beside the key; a list of two numbers: one between them.
        options: Of the calls.
    """

    task: str
    count: int
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The tasks of one producer, and its rate."""

    name: str  # the beginning of its keys
    seed: int
    tasks: list[Some]
    rate: float  # tasks a second
    most: int = 10  # tasks in one call
    patience: float = 120.0  # seconds for repeating a call that fails
    shuffled: bool = True
    own_ids: bool = True  # half of the tasks have an id that the sender chose


class Producer:
    """A sender of the tasks of a plan."""

    def __init__(self, queue: TaskQueue, plan: Plan, ledger: Writer) -> None:
        self._app = queue
        self._plan = plan
        self._ledger = ledger
        self._random = random.Random(plan.seed)
        self.stopping = False

    async def run(self) -> None:
        """Send all tasks, at the rate of the plan."""
        calls = self._calls()
        begun, sent = time.monotonic(), 0
        while calls and not self.stopping:
            size = min(len(calls), self._random.randint(1, self._plan.most))
            batch, calls = calls[:size], calls[size:]
            await asyncio.sleep(max(0.0, begun + sent / self._plan.rate - time.monotonic()))
            await self._send(batch)
            sent += size
        self._ledger.write(Finished(pid=os.getpid()))

    def _calls(self) -> list[tuple[str, Call[Any]]]:
        kinds = [some for some in self._plan.tasks for _ in range(some.count)]
        if self._plan.shuffled:
            self._random.shuffle(kinds)
        tasks = {name.rpartition(".")[2]: task for name, task in self._app.tasks.items()}
        calls = []
        for number, some in enumerate(kinds):
            key = f"{self._plan.name}-{number}"
            options = dict(some.options)
            if (
                self._random.random() < 0.5 and self._plan.own_ids
            ):  # half of them are safe to send again
                options["task_id"] = key
            values = {name: self._value(value) for name, value in some.values.items()}
            calls.append((key, tasks[some.task].with_options(**options).s(key, **values)))
        return calls

    def _value(self, value: Any) -> Any:
        return self._random.uniform(*value) if isinstance(value, list) else value

    async def _send(self, batch: list[tuple[str, Call[Any]]]) -> None:
        self._ledger.write(
            *(
                Attempted(
                    key=key,
                    task=call.name.rpartition(".")[2],
                    task_id=call.options.get("task_id", ""),
                    countdown=call.options.get("countdown", 0.0),
                )
                for key, call in batch
            )
        )
        end = time.monotonic() + self._plan.patience
        while batch:
            try:
                handles = await self._app.kiq_many([call for _, call in batch])
            except BrokerUnavailable as error:
                # Whether it was stored is not known. Only a task with an id of the sender may
                # be sent once more.
                again = [one for one in batch if one[1].options.get("task_id")]
                given_up = [key for key, _ in batch if key not in {key for key, _ in again}]
                if time.monotonic() > end:
                    given_up, again = [key for key, _ in batch], []
                self._ledger.write(*(Refused(key=key, error=str(error)) for key in given_up))
                batch = again
                continue
            self._ledger.write(
                *(
                    Acknowledged(key=key, task_id=handle.id)
                    for (key, _), handle in zip(batch, handles, strict=True)
                )
            )
            return


async def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    ledger = Writer(Path(os.environ["AIOTASKQ_TESTS_FAULTS_LEDGER"]), "producer")
    producer = Producer(app, plan, ledger)

    def stop() -> None:
        producer.stopping = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await producer.run()
    await app.close()


if __name__ == "__main__":
    asyncio.run(main())
