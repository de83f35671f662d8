"""`Retry`: the decision about another attempt, and its delay."""

from __future__ import annotations

import doctest
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from aiotaskq import TaskQueue
from aiotaskq import retry as module
from aiotaskq.contract.message import RetryPolicy
from aiotaskq.errors import ConfigError
from aiotaskq.retry import (
    NEVER,
    Jitter,
    Retry,
    backoff_delay,
    for_call,
    retry_delay,
)

JITTERS = st.sampled_from([True, False, "full"])
BACKOFFS = st.sampled_from(["exponential", "linear", "constant"])
SECONDS = st.floats(0, 1e6)


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        ("exponential", [2, 4, 8, 16, 20]),
        ("linear", [2, 4, 6, 8, 10]),
        ("constant", [2, 2, 2, 2, 2]),
        (lambda attempt: attempt * 7.0, [7, 14, 20, 20, 20]),
        (lambda attempt: -1.0, [0, 0, 0, 0, 0]),
        (lambda attempt: math.nan, [0, 0, 0, 0, 0]),
        (lambda attempt: math.inf, [20, 20, 20, 20, 20]),
    ],
)
def test_the_delay_grows_as_the_backoff_says(backoff: Any, delays: list[float]) -> None:
    retry = Retry(max_attempts=9, delay=2, backoff=backoff, max_delay=20, jitter=False)
    assert [retry_delay(retry, attempt, OSError()) for attempt in range(1, 6)] == delays


def test_the_first_run_counts_as_an_attempt() -> None:
    assert retry_delay(NEVER, 1, OSError()) is None
    assert retry_delay(Retry(max_attempts=2), 1, OSError()) is not None
    assert retry_delay(Retry(max_attempts=2), 2, OSError()) is None


def test_only_the_named_exceptions_are_worth_another_attempt() -> None:
    retry = Retry(on=(OSError, KeyError), never_on=(FileNotFoundError,))
    assert retry_delay(retry, 1, TimeoutError()) is not None
    assert retry_delay(retry, 1, KeyError()) is not None
    assert retry_delay(retry, 1, ValueError()) is None
    assert retry_delay(retry, 1, FileNotFoundError()) is None


def test_by_default_only_exceptions_are_retried() -> None:
    assert retry_delay(Retry(), 1, SystemExit()) is None


@given(
    st.integers(1, 10**18),
    SECONDS,
    SECONDS,
    BACKOFFS | st.floats().map(lambda seconds: lambda attempt: seconds),
    JITTERS,
    st.floats(0, 1),
)
def test_the_delay_never_leaves_its_bounds(
    attempt: int, delay: float, most: float, backoff: Any, jitter: Jitter, chance: float
) -> None:
    retry = Retry(
        max_attempts=math.inf, delay=delay, max_delay=most, backoff=backoff, jitter=jitter
    )
    plain = retry_delay(structs.replace(retry, jitter=False), attempt, OSError())
    jittered = retry_delay(retry, attempt, OSError(), chance=lambda: chance)
    assert plain is not None
    assert jittered is not None
    least = {True: plain / 2, False: plain, "full": 0}[jitter]
    assert 0 <= least <= jittered <= plain <= most


@given(st.lists(st.integers(1, 10**6), min_size=2, unique=True).map(sorted), SECONDS, BACKOFFS)
def test_a_later_attempt_never_waits_for_less(
    attempts: list[int], delay: float, backoff: Any
) -> None:
    retry = Retry(max_attempts=math.inf, delay=delay, backoff=backoff, jitter=False)
    delays = [backoff_delay(retry, attempt) for attempt in attempts]
    assert delays == sorted(delays)


def test_a_backoff_function_gets_the_number_of_the_attempt_that_failed() -> None:
    asked: list[int] = []

    def backoff(attempt: int) -> float:
        asked.append(attempt)
        return attempt * 10

    retry = Retry(max_attempts=4, delay=999, backoff=backoff, max_delay=25, jitter=False)
    delays = [retry_delay(retry, attempt, OSError()) for attempt in (1, 2, 3, 4)]
    assert delays == [10, 20, 25, None]
    assert asked == [1, 2, 3]


def test_without_a_limit_there_is_always_another_attempt() -> None:
    retry = Retry(max_attempts=math.inf)
    assert retry_delay(retry, 10**9, OSError()) is not None
    again = for_call(retry.to_policy(), NEVER)
    assert again.max_attempts == math.inf
    as_json = msgspec.json.decode(msgspec.json.encode(retry.to_policy()), type=RetryPolicy)
    assert for_call(as_json, NEVER) == again


def test_the_own_retry_goes_before_the_default_and_that_before_none() -> None:
    own, default = Retry(delay=1), Retry(delay=2)
    assert effective(own, default) is own
    assert effective(None, default) is default
    assert effective(None, None) is None
    assert effective(NEVER, default) is NEVER


def effective(own: Retry | None, default: Retry | None) -> Retry | None:
    app = TaskQueue("t", broker="memory://", task_default_retry=default)

    @app.task(name="t", retry=own)
    async def task() -> None: ...

    return app.effective_options("t").retry


def test_a_call_asks_for_attempts_after_failures_though_its_task_has_none() -> None:
    by_hand = Retry(on=())
    assert retry_delay(by_hand, 1, OSError()) is None
    assert retry_delay(for_call(Retry().to_policy(), by_hand), 1, OSError()) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": 2.5},
        {"max_attempts": True},
        {"max_attempts": None},
        {"max_attempts": "3"},
        {"max_attempts": math.nan},
        {"jitter": "half"},
        {"jitter": None},
        {"on": (int,)},
        {"delay": -1},
        {"delay": math.nan},
        {"max_delay": math.inf},
        {"backoff": "cubic"},
        {"on": OSError},
        {"on": ["OSError"]},
        {"never_on": ("OSError",)},
    ],
    ids=repr,
)
def test_a_wrong_policy_is_refused_where_it_is_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Retry(**wrong)


@pytest.mark.parametrize("jitter", [True, False, "full"])
def test_numbers_travel_in_a_message_and_types_stay_with_the_task(jitter: Jitter) -> None:
    task = Retry(on=(OSError,), never_on=(TimeoutError,), delay=9)
    call = Retry(max_attempts=7, delay=2, backoff="linear", max_delay=30, jitter=jitter)
    assert for_call(call.to_policy(), task) == Retry(
        max_attempts=7,
        delay=2,
        backoff="linear",
        max_delay=30,
        jitter=jitter,
        on=(OSError,),
        never_on=(TimeoutError,),
    )


@pytest.mark.parametrize(
    "retry", [Retry(on=(OSError,)), Retry(never_on=(OSError,)), Retry(backoff=lambda attempt: 1.0)]
)
def test_options_that_cannot_travel_are_refused_for_one_call(retry: Retry) -> None:
    with pytest.raises(ConfigError, match="where the task is defined"):
        retry.to_policy()


@given(
    st.builds(
        RetryPolicy,
        max_attempts=st.integers(),
        delay=st.floats(),
        backoff=st.text() | BACKOFFS,
        max_delay=st.floats(),
        jitter=st.booleans(),
        full_jitter=st.booleans(),
    )
)
def test_a_nonsensical_policy_from_a_message_never_fails_a_worker(policy: RetryPolicy) -> None:
    delay = retry_delay(for_call(policy, NEVER), 1, OSError())
    assert delay is None or 0 <= delay < math.inf
