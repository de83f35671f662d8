"""One run of a task in a worker: its state, its context, and why it was stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import IntEnum, auto
from typing import Any

from aiotaskq.config import Config
from aiotaskq.context import TaskContext
from aiotaskq.contract.message import Delivery, Message
from aiotaskq.contract.results import Transaction
from aiotaskq.tasks.definition import TaskDefinition


class Stop(IntEnum):
    """Why a running task was cancelled by its worker. A higher one goes before a lower one."""

    RELEASE = auto()  # the worker stops: another one is to run it
    TIMEOUT = auto()  # it ran for too long
    REVOKE = auto()  # somebody cancelled the task
    ABANDON = auto()  # another worker has it, or its end was told already


class Profile:
    """How a task runs here: its own options, and the settings where it has none."""

    __slots__ = ("ignores_result", "limited", "soft_timeout", "timeout", "tracks_start")

    def __init__(self, task: TaskDefinition | None, conf: Config) -> None:
        options = None if task is None else task.options
        ignores = None if options is None else options.ignore_result
        tracks = None if options is None else options.track_started
        self.ignores_result = conf.task_ignore_result if ignores is None else ignores
        self.tracks_start = conf.task_track_started if tracks is None else tracks
        self.timeout: float | None = None
        self.soft_timeout: float | None = None
        if options is not None:
            own, soft = options.timeout, options.soft_timeout
            self.timeout = conf.task_time_limit if own is None else own
            self.soft_timeout = conf.task_soft_time_limit if soft is None else soft
            if options.executor == "thread":  # nothing can be raised inside it
                self.soft_timeout = None
        self.limited = self.timeout is not None or self.soft_timeout is not None


class Execution:
    """A task that runs.

    Attributes:
        begun: Its coroutine was entered.
        stop: Why it was cancelled, if it was.
        softened: Its soft limit has passed, and it has not been told yet.
        transaction: What its task writes in, if it has asked for that.
        timers: Of its limits; None where it has none.
        work: What runs it.
    """

    __slots__ = (
        "begun",
        "delivery",
        "message",
        "profile",
        "softened",
        "started",
        "stop",
        "task",
        "timers",
        "transaction",
        "work",
    )

    def __init__(
        self, delivery: Delivery, message: Message, task: TaskDefinition, profile: Profile
    ) -> None:
        self.delivery = delivery
        self.message = message
        self.task = task
        self.profile = profile
        self.started = time.perf_counter()
        self.begun = False
        self.stop: Stop | None = None
        self.softened = False
        self.timers: list[asyncio.TimerHandle] | None = None
        self.transaction: Transaction | None = None
        self.work: asyncio.Task[None] | None = None

    @property
    def limited(self) -> bool:
        """Whether it has any limit of time."""
        message = self.message
        return (
            self.profile.limited or message.timeout is not None or message.soft_timeout is not None
        )

    @property
    def timeout(self) -> float | None:
        """Seconds that it may take."""
        asked = self.message.timeout
        return self.profile.timeout if asked is None else asked

    @property
    def soft_timeout(self) -> float | None:
        """Seconds after which it is told to come to an end."""
        asked = self.message.soft_timeout
        if asked is None or self.task.options.executor == "thread":
            return self.profile.soft_timeout
        return asked

    @property
    def may_succeed(self) -> bool:
        """Whether it counts if it returns: it may do so in spite of a release."""
        return self.stop in (None, Stop.RELEASE)

    @property
    def took(self) -> float:
        """Seconds since its function was called."""
        return time.perf_counter() - self.started

    def __str__(self) -> str:
        return str(self.message)


class Outdone(Exception):
    """A run whose task has an outcome already: what it wrote in a transaction was undone."""


class ExecutionContext(TaskContext):
    """The context of a run, with the run itself for the innermost step of the onion."""

    __slots__ = ("begin", "run")

    run: Execution
    begin: Callable[[], Awaitable[Transaction]]

    async def transaction(self) -> Any:
        run = self.run
        if run.task.options.executor != "loop":
            return await super().transaction()
        if run.work is not asyncio.current_task():  # two at once would begin two
            raise RuntimeError(
                "ask for the transaction in the task's own coroutine, before it starts others"
            )
        if run.transaction is None:
            run.transaction = await self.begin()
        return run.transaction.connection
