"""Effective options: those of a call over those of its task, and these over the settings.

The one place where that order is decided. The client asks when it sends, the worker when it runs,
a bound task when it looks at itself, a schedule when it is defined.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
from msgspec.structs import replace

from aiotaskq.config import Config
from aiotaskq.contract.message import RetryPolicy
from aiotaskq.retry import NEVER, Retry, for_call
from aiotaskq.tasks.definition import TaskDefinition
from aiotaskq.tasks.option_table import Executor
from aiotaskq.tasks.options import CallOptions, TaskOptions

_NOT_GIVEN = TaskOptions()


class RunOptions(Protocol):
    """The options of a call that travel with it: of a `Message`, and of the context of its run."""

    @property
    def timeout(self) -> float | None:
        """Seconds; None: not given."""
        ...

    @property
    def soft_timeout(self) -> float | None:
        """Seconds; None: not given."""
        ...

    @property
    def retry(self) -> RetryPolicy | None:
        """The retry; None: not given."""
        ...


class EffectiveOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options that hold for a task or for one call of it.

    A snapshot: settings that change later do not change it.
    """

    queue: str
    priority: int
    timeout: float | None  # seconds; None: no limit
    soft_timeout: float | None  # seconds; None: no limit
    retry: Retry | None  # None: neither call nor task nor settings have one
    default_retry_delay: float | None  # seconds, of self.retry(); None: as `retry` says
    ignore_result: bool
    track_started: bool
    executor: Executor

    @classmethod
    def of(cls, name: str, task: TaskDefinition | None, conf: Config) -> EffectiveOptions:
        """Return the options of a task where a call gives none.

        Args:
            name: The name of the task.
            task: Its definition; None: it is not registered here.
            conf: The settings.
        """
        own = _NOT_GIVEN if task is None else task.options
        return cls(
            queue=own.queue or conf.route(name) or conf.task_default_queue,
            priority=conf.task_default_priority if own.priority is None else own.priority,
            timeout=_first(own.timeout, conf.task_time_limit),
            soft_timeout=_first(own.soft_timeout, conf.task_soft_time_limit),
            retry=conf.task_default_retry if own.retry is None else own.retry,
            default_retry_delay=own.default_retry_delay,
            ignore_result=(
                conf.task_ignore_result if own.ignore_result is None else own.ignore_result
            ),
            track_started=(
                conf.task_track_started if own.track_started is None else own.track_started
            ),
            executor=own.executor or conf.task_default_executor,
        )

    @property
    def is_limited(self) -> bool:
        """Return whether a run has any limit of time."""
        return self.timeout is not None or self.soft_timeout is not None

    def for_call(self, options: CallOptions) -> EffectiveOptions:
        """Return the options of a call that is to be sent, given the options of the call."""
        queue, priority = options.get("queue"), options.get("priority")
        if queue is None and priority is None:
            return self
        return replace(
            self,
            queue=self.queue if queue is None else queue,
            priority=self.priority if priority is None else priority,
        )

    def for_run(self, run: RunOptions) -> EffectiveOptions:
        """Return the options of a run, given the options that came with its message."""
        timeout, soft, policy = run.timeout, run.soft_timeout, run.retry
        if timeout is None and soft is None and policy is None:  # nearly always
            return self
        return replace(
            self,
            timeout=_first(timeout, self.timeout),
            soft_timeout=_first(soft, self.soft_timeout),
            retry=self.retry if policy is None else for_call(policy, self.retry or NEVER),
            default_retry_delay=self.default_retry_delay if policy is None else None,
        )


def _first(given: float | None, otherwise: float | None) -> float | None:
    return otherwise if given is None else given
