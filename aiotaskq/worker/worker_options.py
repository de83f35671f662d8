"""The options of one worker: those given, else the settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypedDict, TypeVar, Unpack

import msgspec

from aiotaskq.config import Config, value_types
from aiotaskq.config.value_types import InvalidValue, ValueType
from aiotaskq.errors import ConfigError
from aiotaskq.ids import worker_name
from aiotaskq.tasks.option_table import OPTIONS

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
        _check(given)
        queues = given.get("queues")
        concurrency = _first(given.get("concurrency"), conf.worker_concurrency)
        most_threads = min(concurrency, _MOST_THREADS)
        return cls(
            name=given.get("name") or worker_name(),
            queues=list(dict.fromkeys(queues or [conf.task_default_queue])),
            weights=dict(queues) if isinstance(queues, Mapping) and len(queues) > 1 else None,
            concurrency=concurrency,
            threads=_first(given.get("threads"), conf.worker_threads, most_threads),
            processes=_first(conf.worker_process_pool_size, os.cpu_count() or 1),
            grace_period=_first(given.get("grace_period"), conf.worker_grace_period),
            burst=given.get("burst") or False,
            max_tasks=given.get("max_tasks"),
        )


_TYPES: Mapping[str, ValueType[Any, Any]] = {
    "name": OPTIONS["name"].value_type,
    "concurrency": value_types.whole(1),
    "threads": value_types.whole(1),
    "grace_period": value_types.seconds(zero=True),
    "burst": value_types.flag(),
    "max_tasks": value_types.whole(1),
}


def _check(given: WorkerKeywords) -> None:
    unknown = given.keys() - WorkerKeywords.__annotations__.keys()
    if unknown:
        raise TypeError(f"a worker has no option {min(unknown)}")
    for name, value in given.items():
        if value is None or name == "queues":
            continue
        try:
            _TYPES[name].check(value)
        except InvalidValue:
            label = name.replace("_", " ")
            raise ConfigError(f"{label} is {value!r}; it must be {_TYPES[name].wants}") from None
    queues = given.get("queues")
    if queues is not None:
        _check_queues(queues)


def _check_queues(queues: Sequence[str] | Mapping[str, int]) -> None:
    if isinstance(queues, str):
        raise ConfigError(f"queues is {queues!r}; it must be a list, such as [{queues!r}]")
    if not isinstance(queues, Mapping | Sequence | AbstractSet):
        raise ConfigError(f"queues is {queues!r}; it must be a list of names, or weights by name")
    if not queues:
        raise ConfigError("queues is empty, and a worker without a queue never has anything to do")
    for queue in queues:
        OPTIONS["queue"].check(queue)
    if isinstance(queues, Mapping):
        for queue, weight in queues.items():
            if type(weight) is not int or weight < 1:
                raise ConfigError(
                    f"the weight of the queue {queue} is {weight!r}; it must be a whole number, and"
                    " 1 is the least. Leave out a queue that is not to be served"
                )


def _first(*candidates: T | None) -> T:
    for candidate in candidates:
        if candidate is not None:
            return candidate
    raise ValueError("no candidate")
