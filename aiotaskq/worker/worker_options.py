"""The options of one worker: those given, else the settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypedDict, TypeVar, Unpack

import msgspec

from aiotaskq.config import Config
from aiotaskq.errors import ConfigError
from aiotaskq.ids import worker_name

T = TypeVar("T")

_MOST_THREADS = 64  # where the settings give no number


class WorkerKeywords(TypedDict, total=False):
    """The options of a worker, as keywords; one that is None is not given."""

    name: str | None
    queues: Sequence[str] | Mapping[str, int] | None
    concurrency: int | None
    threads: int | None
    grace_period: float | None
    burst: bool
    max_tasks: int | None
    """The most deliveries to take; None: without limit."""


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a worker, each as it was given, else as the settings have it."""

    name: str
    queues: Sequence[str]
    weights: Mapping[str, int] | None  # by queue; None: queues are drained in the order given
    concurrency: int
    threads: int
    processes: int  # in the pool for plain functions
    grace_period: float
    burst: bool
    max_tasks: int | None

    @classmethod
    def choose(cls, conf: Config, **given: Unpack[WorkerKeywords]) -> WorkerOptions:
        """Return the options, with the settings for those that are not given.

        Raises:
            ConfigError: An option is out of its range.
        """
        queues = given.get("queues")
        if queues is not None:
            _check_queues(queues)
        concurrency = _first(given.get("concurrency"), conf.worker_concurrency)
        most_threads = min(concurrency, _MOST_THREADS)
        options = cls(
            name=given.get("name") or worker_name(),
            queues=list(dict.fromkeys(queues or [conf.task_default_queue])),
            weights=dict(queues) if isinstance(queues, Mapping) and len(queues) > 1 else None,
            concurrency=concurrency,
            threads=_first(given.get("threads"), conf.worker_threads, most_threads),
            processes=_first(conf.worker_process_pool_size, os.cpu_count() or 1),
            grace_period=_first(given.get("grace_period"), conf.worker_grace_period),
            burst=given.get("burst", False),
            max_tasks=given.get("max_tasks"),
        )
        for what in ("concurrency", "threads", "processes"):
            number = getattr(options, what)
            if not isinstance(number, int) or number < 1:
                raise ConfigError(f"{what} is {number!r}; it is a whole number, and 1 is the least")
        if options.grace_period < 0:
            raise ConfigError("the grace period is seconds, 0 or more")
        return options


def _check_queues(queues: Sequence[str] | Mapping[str, int]) -> None:
    if isinstance(queues, str):
        raise ConfigError(f"queues is {queues!r}; it is a list, such as [{queues!r}]")
    if not queues:
        raise ConfigError("queues is empty, and a worker without a queue never has anything to do")
    if isinstance(queues, Mapping):
        for queue, weight in queues.items():
            if type(weight) is not int or weight < 1:
                raise ConfigError(
                    f"the weight of the queue {queue} is {weight!r}; it is a whole number, and 1 is"
                    " the least. Leave out a queue that is not to be served"
                )


def _first(*candidates: T | None) -> T:
    for candidate in candidates:
        if candidate is not None:
            return candidate
    raise ValueError("no candidate")
