"""Mistakes in the schedules of the code: each error names the schedule."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from aiotaskq import Schedule, TaskQueue
from aiotaskq.errors import ConfigError
from aiotaskq.scheduling.schedules import define_all


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"schedule": 10}, "it has no 'task'"),
        ({"task": "t"}, "it has no 'schedule'"),
        ({"task": "t", "schedule": "often"}, "has 1 fields"),
        ({"task": "t", "schedule": 10, "crontab": 1}, "there is no 'crontab' in a schedule"),
        ({"task": "t", "schedule": 10, "relative": False}, "intervals lie on a grid"),
        ({"task": "t", "schedule": 10, "misfire": "never"}, "misfire is 'never'; it may be 'skip'"),
        ({"task": "t", "schedule": Schedule(10), "jitter": 3}, "'jitter' stands beside a Schedule"),
        ("t", "is no mapping"),
    ],
)
def test_a_wrong_entry_of_beat_schedule_is_named(fields: Any, complaint: str) -> None:
    app = TaskQueue("app")
    with pytest.raises(ConfigError, match=f"'wrong': .*{complaint}"):
        app.conf.beat_schedule = {"wrong": fields}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"args": [object()]}, "object cannot be encoded"),
        ({"kwargs": {"x": {1, object()}}}, "argument x: a value of type set cannot be encoded"),
        ({"args": [1, 2]}, "too many positional arguments"),
        ({"options": {"queue": 3}}, "queue is 3"),
        ({"options": {"eta": datetime(2026, 1, 1)}}, "eta"),
        ({"schedule": Schedule(10, args=[object()])}, "object cannot be encoded"),
        ({"task": "a\nb"}, "name"),
    ],
)
def test_an_entry_that_cannot_be_sent_is_named(fields: Any, complaint: str) -> None:
    app = TaskQueue("app")

    @app.task(name="t")
    async def look(x: int = 0) -> None: ...

    app.conf.beat_schedule = {
        "good": {"task": "t", "schedule": 10},
        "wrong": {"task": "t", "schedule": 10, **fields},
    }
    with pytest.raises(ConfigError, match=f"the schedule 'wrong': .*{complaint}"):
        define_all(app, app.declared_schedules())


def test_an_id_that_is_no_text_is_shown() -> None:
    with pytest.raises(ConfigError, match=r"beat_schedule.*: 3 is no id of a schedule"):
        TaskQueue("app").conf.beat_schedule = {3: {"task": "t", "schedule": 10}}  # type: ignore[dict-item]  # wrong


@pytest.mark.parametrize("when", [-1, "often", datetime.min])
def test_a_wrong_schedule_of_a_task_is_named(when: Any) -> None:
    with pytest.raises(ConfigError, match=r"^schedule is .*; "):
        TaskQueue("app").task(schedule=when)(print)
