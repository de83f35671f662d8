"""Options of the decorator: limits and retries, also under their names in Celery."""

from __future__ import annotations

import math
from typing import Any

import pytest

from aiotaskq import ConfigError, Retry, TaskQueue
from aiotaskq.retry import retry_delay
from aiotaskq.tasks.options import TaskOptions, task_options


async def coroutine(x: int) -> int:
    return x


def plain(x: int) -> int:
    return x


def options(**given: Any) -> TaskOptions:
    return task_options(coroutine, given)


def delays(retry: Retry | None, count: int, error: BaseException) -> list[float | None]:
    """Return the delay after each attempt, with the largest possible jitter."""
    assert retry is not None
    return [retry_delay(retry, n, error, chance=lambda: 1.0) for n in range(1, count + 1)]


# --- limits -------------------------------------------------------------------------------------


def test_celerys_names_of_the_limits_are_understood() -> None:
    assert options(time_limit=5, soft_time_limit=3) == options(timeout=5, soft_timeout=3)
    assert options(time_limit=None, timeout=5).timeout == 5


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"timeout": 5, "time_limit": 5}, "timeout is given twice"),
        ({"soft_timeout": 5, "timeout": 5}, "soft_timeout must be less"),
        ({"soft_time_limit": 5, "time_limit": 4}, "soft_timeout must be less"),
        ({"soft_timeout": 0}, "soft_timeout is 0"),
        ({"soft_time_limit": math.inf}, "soft_timeout is inf"),
        ({"timelimit": 5}, "did you mean time"),
        ({"bind": 1}, "bind is 1"),
        ({"acks_late": False}, "at least once"),
        ({"reject_on_worker_lost": False}, "max_crashes"),
    ],
)
def test_senseless_limits_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        options(**given)


def test_options_that_ask_for_the_only_behaviour_are_accepted() -> None:
    assert options(acks_late=True, reject_on_worker_lost=True) == options()


def test_the_soft_limit_of_a_call_has_to_be_less_than_the_limit_that_holds() -> None:
    app = TaskQueue("t", broker="memory://")
    task = app.task(timeout=10)(coroutine)
    with pytest.raises(ConfigError, match="soft_timeout is 10 and timeout 10"):
        task.with_options(soft_timeout=10)
    assert task.with_options(soft_timeout=10, timeout=11).s(1).options == {
        "soft_timeout": 10,
        "timeout": 11,
    }
    assert task.with_options(soft_timeout=9).s(1).options == {"soft_timeout": 9}


async def test_an_option_is_checked_for_a_task_called_by_name_too() -> None:
    app = TaskQueue("t", broker="memory://")
    app.task(name="limited", timeout=5)(plain)
    with pytest.raises(ConfigError, match="soft_timeout is 5 and timeout 5"):
        await app.send("limited", (1,), soft_timeout=5)


# --- Celery's retries ---------------------------------------------------------------------------


def test_without_options_nothing_is_chosen() -> None:
    assert (options().retry, options().default_retry_delay) == (None, None)


def test_autoretry_for_alone_tries_three_times_again_after_three_minutes() -> None:
    retry = options(autoretry_for=(OSError,)).retry
    assert delays(retry, 4, TimeoutError()) == [180, 180, 180, None]
    assert delays(retry, 1, ValueError()) == [None]


def test_the_delay_without_backoff_is_neither_bounded_nor_random() -> None:
    retry = options(
        autoretry_for=[OSError], default_retry_delay=5000, retry_backoff_max=10, retry_jitter=True
    ).retry
    assert retry is not None
    assert retry_delay(retry, 1, OSError(), chance=lambda: 0.0) == 5000


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        (True, [1, 2, 4, 8, 10, None]),
        (3, [3, 6, 10, 10, 10, None]),
        (0.5, [1, 2, 4, 8, 10, None]),
        (False, [180, 180, 180, 180, 180, None]),
        (0, [180, 180, 180, 180, 180, None]),
    ],
)
def test_backoff_doubles_from_its_factor_up_to_its_most(backoff: Any, expected: Any) -> None:
    retry = options(
        autoretry_for=(OSError,), max_retries=5, retry_backoff=backoff, retry_backoff_max=10
    ).retry
    assert delays(retry, 6, OSError()) == expected


def test_jitter_is_anything_from_nothing_to_the_whole_and_can_be_left_out() -> None:
    retry = options(autoretry_for=(OSError,), retry_backoff=4).retry
    assert retry is not None
    assert retry_delay(retry, 2, OSError(), chance=lambda: 0.0) == 0
    assert retry_delay(retry, 2, OSError(), chance=lambda: 0.5) == 4
    assert retry_delay(retry, 2, OSError(), chance=lambda: 1.0) == 8
    even = options(autoretry_for=(OSError,), retry_backoff=4, retry_jitter=False).retry
    assert even is not None
    assert retry_delay(even, 2, OSError(), chance=lambda: 0.0) == 8


def test_the_most_that_a_backoff_waits_is_ten_minutes() -> None:
    retry = options(autoretry_for=(OSError,), retry_backoff=True, max_retries=None).retry
    assert delays(retry, 12, OSError())[-2:] == [600, 600]


def test_max_retries_none_is_no_limit_and_zero_is_none() -> None:
    assert options(autoretry_for=(OSError,), max_retries=None).retry.max_attempts == math.inf  # type: ignore[union-attr]  # it has one
    assert delays(options(autoretry_for=(OSError,), max_retries=0).retry, 1, OSError()) == [None]


def test_exceptions_in_dont_autoretry_for_are_not_tried_again() -> None:
    retry = options(autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,)).retry
    assert delays(retry, 1, FileNotFoundError()) == [None]
    assert delays(retry, 1, PermissionError()) == [180]


def test_retry_kwargs_say_the_same_in_one_mapping() -> None:
    retry = options(autoretry_for=(OSError,), retry_kwargs={"max_retries": 1, "countdown": 7}).retry
    assert delays(retry, 2, OSError()) == [7, None]


def test_without_autoretry_for_no_exception_is_tried_again_by_itself() -> None:
    given = options(max_retries=5, default_retry_delay=7)
    assert delays(given.retry, 1, OSError()) == [None]
    assert given.retry is not None
    assert (given.retry.max_attempts, given.default_retry_delay) == (6, 7)


def test_retry_and_celerys_options_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"retry and Celery's .*\(autoretry_for, max_retries\)"):
        options(retry=Retry(), autoretry_for=(OSError,), max_retries=3)
    assert options(retry=None, max_retries=3).retry is not None


@pytest.mark.parametrize(
    "given",
    [
        {"autoretry_for": OSError},
        {"autoretry_for": ("OSError",)},
        {"autoretry_for": (int,)},
        {"dont_autoretry_for": OSError},
        {"max_retries": -1},
        {"max_retries": 2.5},
        {"max_retries": True},
        {"default_retry_delay": "60"},
        {"default_retry_delay": -1},
        {"retry_backoff": "yes"},
        {"retry_backoff": -2},
        {"retry_backoff": True, "retry_backoff_max": math.inf},
        {"retry_jitter": "full"},
        {"retry_kwargs": {"eta": 5}},
        {"retry_kwargs": 5},
    ],
    ids=repr,
)
def test_a_wrong_option_of_retries_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(given)[-1]):
        options(**given)
