"""The table of options, and everything that is written out beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from aiotaskq import ConfigError, Retry, TaskQueue, every
from aiotaskq.config import Config
from aiotaskq.tasks.effective import EffectiveOptions
from aiotaskq.tasks.option_table import CELERY_NAMES, OPTIONS, Scope, options_of
from aiotaskq.tasks.options import CallOptions, TaskKeywords, TaskOptions, task_options

TASK, CALL = options_of(Scope.TASK), options_of(Scope.CALL)

RIGHT: dict[str, Any] = {
    "name": "reports.render",
    "bind": True,
    "queue": "slow",
    "priority": 9,
    "timeout": 1.5,
    "soft_timeout": 1,
    "retry": Retry(),
    "executor": "process",
    "ignore_result": True,
    "track_started": False,
    "schedule": every(60),
    "countdown": -1,
    "eta": datetime(2026, 1, 1),
    "expires": 60,
    "task_id": "a",
    "headers": {"a": "b"},
    "connection": object(),
    "autoretry_for": (OSError,),
    "dont_autoretry_for": [FileNotFoundError],
    "max_retries": 0,
    "default_retry_delay": 0,
    "retry_backoff": True,
    "retry_backoff_max": 60,
    "retry_jitter": False,
    "retry_kwargs": {"max_retries": 3, "countdown": 1},
    "acks_late": True,
    "reject_on_worker_lost": True,
}

FLAG: list[Any] = ["no", "yes", "", 0, 1, [], {}]
SECONDS: list[Any] = ["5", True, -1, math.nan, math.inf, [], {}]
WRONG: dict[str, list[Any]] = {
    "name": ["", 5, "a\nb", "x" * 201, True, ["a"]],
    "bind": FLAG,
    "queue": ["", "a,b", 5, True, ["a"], "x" * 201],
    "priority": [-1, 10, 1.0, True, "9", []],
    "timeout": [*SECONDS, 0],
    "soft_timeout": [*SECONDS, 0],
    "retry": [3, True, "always", {}, Retry],
    "executor": ["threads", "", 1, True, [], {}],
    "ignore_result": FLAG,
    "track_started": FLAG,
    "schedule": ["", "not a crontab", True, [], {}, -5],
    "countdown": ["5", True, math.nan, math.inf, []],
    "eta": ["tomorrow", 5, True],
    "expires": ["5", True, math.nan, []],
    "task_id": ["", True, 1.5, b"a", ["a"], "a\0b"],
    "headers": ["a", {"a": 1}, {1: "a"}, [("a", "b")], True],
    "connection": ["postgresql://localhost", 5, True, b""],
    "autoretry_for": [OSError, ("OSError",), (int,), "OSError", True, 5],
    "dont_autoretry_for": [OSError, ("OSError",), (int,)],
    "max_retries": [-1, 2.5, True, "3", []],
    "default_retry_delay": SECONDS,
    "retry_backoff": ["yes", -1, math.nan, math.inf, []],
    "retry_backoff_max": SECONDS,
    "retry_jitter": ["full", 0, 1],
    "retry_kwargs": [5, {"eta": 5}, {"max_retries": -1}, {"countdown": "5"}, [], "a"],
    "acks_late": [False, 1, "yes"],
    "reject_on_worker_lost": [False, 1, "yes"],
}


class HostileValue:
    """A value whose own methods raise, which no option takes and whose error must say so."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]  # nothing may look it up


async def coroutine(x: int) -> int:
    return x


def plain(x: int) -> int:
    return x


def test_the_typed_keywords_are_those_of_the_table() -> None:
    assert set(TaskKeywords.__annotations__) == (TASK | CELERY_NAMES.keys()) - {"bind"}
    assert set(CallOptions.__annotations__) == CALL


def test_what_is_kept_of_a_task_are_options_of_the_table() -> None:
    kept = set(TaskOptions.__struct_fields__)
    parts = {name for name, option in OPTIONS.items() if option.part_of}
    assert kept - parts == TASK - parts - {"name", "acks_late", "reject_on_worker_lost"}


def test_the_effective_options_are_those_with_a_setting_and_where_the_task_runs() -> None:
    with_a_setting = {name for name, option in OPTIONS.items() if option.setting}
    assert set(EffectiveOptions.__struct_fields__) == with_a_setting | {
        "executor",
        "default_retry_delay",
    }
    assert {OPTIONS[name].setting for name in with_a_setting} <= set(Config.settings())


def test_the_docstring_of_the_decorator_says_what_the_table_says() -> None:
    text = " ".join((TaskQueue.task.__doc__ or "").split())
    entries = {name: OPTIONS[name].meaning for name in OPTIONS if name in TASK}
    entries |= {celery: f"Celery's name of `{ours}`." for celery, ours in CELERY_NAMES.items()}
    missing = [name for name, said in entries.items() if f" {name}: {said}" not in text]
    assert missing == []
    arguments = text.partition("Args:")[2].partition("Raises:")[0]
    named = set(re.findall(r"(?<=[.`] )(\w+): ", arguments)) | {"name"}
    assert named - entries.keys() == {"**options"} & named


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_takes_its_values(name: str) -> None:
    value = RIGHT[name]
    app = TaskQueue("t", broker="memory://")
    if name in TASK:
        fn = plain if name == "executor" else coroutine
        options: dict[str, Any] = {"name": "t", name: value}
        app.task(**options)(fn)
    if name in CALL:
        task = app.task(name="u")(coroutine)
        assert task.with_options(**{name: value}).s(1).options == {name: value}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, wrong in WRONG.items() for value in wrong], ids=repr
)
def test_a_wrong_value_is_refused_where_it_is_given(name: str, value: Any) -> None:
    app = TaskQueue("t", broker="memory://")
    task = app.task(coroutine)
    if name in TASK:
        options: dict[str, Any] = {"name": "t", name: value}
        said = "schedule|Schedule|crontab|every" if name == "schedule" else name
        with pytest.raises(ConfigError, match=said):
            app.task(**options)(plain)
    if name in CALL:
        for give in (task.with_options, lambda **options: task.apply_async((1,), **options)):
            with pytest.raises(ConfigError, match=name):
                give(**{name: value})
    assert list(app.tasks) == [task.name]


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"connection"}))
def test_a_value_whose_own_methods_raise_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        OPTIONS[name].check(HostileValue())


def test_all_lists_of_this_file_are_complete() -> None:
    assert RIGHT.keys() == WRONG.keys() == OPTIONS.keys()


def test_celerys_names_take_and_refuse_the_same_values() -> None:
    assert CELERY_NAMES == {"time_limit": "timeout", "soft_time_limit": "soft_timeout"}
    for celery, ours in CELERY_NAMES.items():
        assert task_options(coroutine, {celery: 5}) == task_options(coroutine, {ours: 5})
        for value in WRONG[ours]:
            with pytest.raises(ConfigError, match=ours):
                task_options(coroutine, {celery: value})


# --- what holds ---------------------------------------------------------------------------------


def effective(
    app: TaskQueue, fn: Callable[..., Any] = coroutine, **options: Any
) -> EffectiveOptions:
    task = app.task(**options)(fn)
    return app.effective_options(task.name)


SETTINGS: dict[str, tuple[Any, Any, Any]] = {  # the default, and two other values
    "queue": ("default", "app", "task"),
    "priority": (0, 3, 7),
    "timeout": (None, 50.0, 60.0),
    "soft_timeout": (None, 5.0, 6.0),
    "retry": (None, Retry(delay=1), Retry(delay=2)),
    "ignore_result": (False, True, False),
    "executor": ("thread", "process", "thread"),
    "track_started": (False, True, False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_task_goes_before_its_application_and_that_before_the_default(name: str) -> None:
    default, of_the_app, of_the_task = SETTINGS[name]
    app = TaskQueue("t", broker="memory://")
    setting = OPTIONS[name].setting
    assert setting is not None
    assert getattr(effective(app, plain), name) == default
    app.conf[setting] = of_the_app
    assert getattr(effective(app, plain), name) == of_the_app
    assert getattr(effective(app, plain, **{name: of_the_task}), name) == of_the_task


def test_coroutine_functions_run_on_the_loop_whatever_the_setting_says() -> None:
    app = TaskQueue("t", broker="memory://", task_default_executor="process")
    assert effective(app).executor == "loop"


def test_a_route_goes_before_the_default_queue_and_the_task_before_the_route() -> None:
    app = TaskQueue("t", broker="memory://", task_routes={"reports.*": "slow"})
    assert effective(app, name="reports.render").queue == "slow"
    assert effective(app, name="other").queue == "default"
    assert effective(app, name="reports.quick", queue="quick").queue == "quick"
    assert app.effective_options("reports.unknown").queue == "slow"


def test_settings_that_change_hold_from_then_on() -> None:
    app = TaskQueue("t", broker="memory://")
    task = app.task(coroutine)
    before = app.effective_options(task.name)
    assert app.effective_options(task.name) is before
    app.conf.task_time_limit = 5
    assert (before.timeout, app.effective_options(task.name).timeout) == (None, 5)


def test_a_task_that_is_registered_anew_has_its_new_options() -> None:
    app = TaskQueue("t", broker="memory://")
    assert effective(app, name="t", queue="a").queue == "a"
    assert effective(app, name="t", queue="b").queue == "b"


def test_only_a_bounded_number_of_unknown_names_is_remembered() -> None:
    app = TaskQueue("t", broker="memory://")
    for number in range(3000):
        assert app.effective_options(f"unknown.{number}").queue == "default"
    assert len(app._effective) == 1000
    task = app.task(queue="own")(coroutine)
    assert app.effective_options(task.name).queue == "own"
    assert app.effective_options(task.name) is app.effective_options(task.name)


def test_a_task_that_is_registered_after_it_was_sent_by_name_has_its_options() -> None:
    app = TaskQueue("t", broker="memory://")
    assert app.effective_options("late").queue == "default"
    app.task(name="late", queue="own")(coroutine)
    assert app.effective_options("late").queue == "own"
