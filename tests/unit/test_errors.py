"""The tree of exceptions, and their copies."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from aiotaskq import errors
from aiotaskq.errors import (
    AioTaskQError,
    BatchRefused,
    PayloadTooLarge,
    ResultTimeout,
    RetryLater,
    Snooze,
    TaskFailed,
)

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and kind.__module__ == errors.__name__
}


def drawn() -> dict[str, str | None]:
    """Return the parent of each class in the drawing."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ((?:│   |    )*)(?:(├──|└──) )?([A-Z]\w+)", line)
        if found is None:
            continue
        depth = len(found[1]) // 4 + (found[2] is not None)
        above[depth:] = [found[3]]
        parents[found[3]] = above[depth - 1] if depth else None
    return parents


def test_the_tree_drawn_equals_the_classes() -> None:
    assert drawn() == {
        name: None if kind is AioTaskQError else kind.__bases__[0].__name__
        for name, kind in CLASSES.items()
    }


def test_every_class_is_an_aiotaskq_error() -> None:
    assert all(issubclass(kind, AioTaskQError) for kind in CLASSES.values())


def test_a_result_timeout_is_a_timeout_error() -> None:
    assert issubclass(ResultTimeout, TimeoutError)


class Why(Exception):
    """An error that equals another one of its kind, so that copies can be compared."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    __hash__ = Exception.__hash__


MADE: dict[str, Callable[[], AioTaskQError]] = {
    "BatchRefused": lambda: BatchRefused({2: Why("why"), 5: Why("else")}, answer=["a"]),
    "PayloadTooLarge": lambda: PayloadTooLarge("why", size=2, limit=1),
    "RetryLater": lambda: RetryLater(5, "why", max_attempts=math.inf),
    "Snooze": lambda: Snooze(5, "why"),
}


@pytest.mark.parametrize("kind", [RetryLater, Snooze])
@pytest.mark.parametrize("delay", ["why", -1, math.inf, math.nan, timedelta(1)], ids=repr)
def test_a_delay_that_is_none_fails_the_task_that_asks(kind: Any, delay: Any) -> None:
    with pytest.raises(TypeError, match="number of seconds"):
        kind(delay)


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_can_be_copied_and_pickled(name: str, copied: object) -> None:
    assert callable(copied)
    kind: Any = CLASSES[name]
    error = MADE[name]() if name in MADE else kind("why")
    again = copied(error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert "why" in str(again)
    assert vars(again) == vars(error)


def test_a_failed_task_keeps_its_facts_when_pickled() -> None:
    error = TaskFailed("why", task_id="1", exc_type="E", exc_module="m", remote_traceback="Trace")
    again = pickle.loads(pickle.dumps(error))
    assert (again.task_id, again.exc_type, again.exc_module) == ("1", "E", "m")
    assert again.__notes__ == ["\nIn the worker:\nTrace"]
