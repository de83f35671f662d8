"""Retries: whether a failed task runs again, and after which delay. Pure functions, no I/O."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from aiotaskq.backoff import doubled, jittered
from aiotaskq.contract.message import RetryPolicy
from aiotaskq.errors import ConfigError

Jitter: TypeAlias = Literal[True, False, "full"]
Growth: TypeAlias = Literal["exponential", "linear", "constant"] | Callable[[int], float]


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """The rule for further attempts: their number, their delays and the exceptions that allow them.

    Args:
        max_attempts: The number of runs in all, with the first one; ``math.inf`` for no limit.
        delay: Seconds before the second attempt.
        backoff: How the delay grows after that: ``"exponential"`` doubles it, ``"linear"`` adds
            `delay` each time, ``"constant"`` keeps it. A function gets the number of the attempt
            that failed and returns seconds.
        max_delay: The longest delay, in seconds.
        jitter: Wait for a random time between half the delay and the whole delay, so that tasks
            that failed together do not run again together. ``"full"``: between 0 and the whole
            delay.
        on: Exceptions after which the task runs again, subclasses included. An empty tuple: only
            if the task itself raises `RetryLater`.
        never_on: Exceptions after which it does not, even if `on` has a base class of them.
    """

    max_attempts: float = 3
    delay: float = 1.0
    backoff: Growth = "exponential"
    max_delay: float = 600.0
    jitter: Jitter = True
    on: tuple[type[BaseException], ...] = (Exception,)
    never_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        most: Any = self.max_attempts  # of any type, whatever the annotation says
        if most != math.inf and (type(most) is not int or most < 1):
            raise ConfigError(
                f"max_attempts is {most!r}; it must be a whole number of at least 1, which includes"
                " the first run, or math.inf for no limit"
            )
        if not (0 <= self.delay < math.inf and 0 <= self.max_delay < math.inf):
            raise ConfigError("delay and max_delay must be seconds, 0 or more")
        if not callable(self.backoff) and self.backoff not in _GROWTH:
            raise ConfigError(
                f"backoff is {self.backoff!r}; it must be {', '.join(map(repr, _GROWTH))}"
                " or a function of the attempt"
            )
        if self.jitter not in (True, False, "full"):
            raise ConfigError(f'jitter is {self.jitter!r}; it must be True, False or "full"')
        for name in ("on", "never_on"):
            kinds: Any = getattr(self, name)  # of any type, whatever the annotation says
            if not (isinstance(kinds, tuple) and all(map(_is_exception, kinds))):
                raise ConfigError(f"{name} is {kinds!r}; it must be a tuple of exception types")

    def to_policy(self) -> RetryPolicy:
        """Return the form for a message, for a call that has a retry of its own.

        Raises:
            ConfigError: It has a function or exception types; a message cannot contain these.
        """
        if callable(self.backoff) or self.on != (Exception,) or self.never_on:
            raise ConfigError(
                "the Retry of a single call is sent in the message, which cannot contain a function"
                " or exception types: give these where the task is defined"
            )
        return RetryPolicy(
            max_attempts=int(min(self.max_attempts, _UNLIMITED)),
            delay=self.delay,
            backoff=self.backoff,
            max_delay=self.max_delay,
            jitter=bool(self.jitter),
            full_jitter=self.jitter == "full",
        )


def _is_exception(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


_UNLIMITED = 2**53  # attempts; JSON and MessagePack have this number, and no task reaches it


_GROWTH: dict[str, Callable[[float, int], float]] = {
    "exponential": lambda delay, attempt: doubled(delay, attempt - 1),
    "linear": lambda delay, attempt: delay * attempt,
    "constant": lambda delay, attempt: delay,
}

NEVER = Retry(max_attempts=1)


def for_call(policy: RetryPolicy, task: Retry) -> Retry:
    """Return the task's `Retry` with the numbers of one call.

    The numbers come from a message. Wrong ones are corrected: there is no caller for an error.
    """
    jitter: Jitter = "full" if policy.jitter and policy.full_jitter else policy.jitter
    unlimited = policy.max_attempts >= _UNLIMITED
    return Retry(
        max_attempts=math.inf if unlimited else max(1, policy.max_attempts),
        delay=_seconds(policy.delay),
        backoff=policy.backoff if policy.backoff in _GROWTH else "exponential",  # type: ignore[arg-type]  # it is one of them
        max_delay=_seconds(policy.max_delay),
        jitter=jitter,
        on=task.on or (Exception,),  # a call with a retry is retried after any failure
        never_on=task.never_on,
    )


def _seconds(number: float) -> float:
    return min(max(0.0, number), 1e9)  # in this order, NaN becomes 0


def retry_delay(
    retry: Retry, attempt: int, error: BaseException, *, chance: Callable[[], float] = random.random
) -> float | None:
    """Return the seconds to wait after `attempt` failed with `error`; None to give up.

    >>> policy = Retry(max_attempts=4, delay=2, jitter=False)
    >>> [retry_delay(policy, attempt, ValueError()) for attempt in (1, 2, 3, 4)]
    [2.0, 4.0, 8.0, None]
    """
    if not may_retry(retry, attempt, error):
        return None
    return backoff_delay(retry, attempt, chance=chance)


def may_retry(retry: Retry, attempt: int, error: BaseException) -> bool:
    """Return whether a task runs again after `attempt` failed with `error`."""
    return (
        attempt < retry.max_attempts
        and isinstance(error, retry.on)
        and not isinstance(error, retry.never_on)
    )


def backoff_delay(
    retry: Retry, attempt: int, *, chance: Callable[[], float] = random.random
) -> float:
    """Return the seconds to wait after `attempt`, independent of the exception."""
    if callable(retry.backoff):
        delay = retry.backoff(attempt)
    else:
        delay = _GROWTH[retry.backoff](retry.delay, attempt)
    delay = min(max(0.0, delay), retry.max_delay)  # in this order, NaN becomes 0
    if retry.jitter == "full":
        return delay * chance()
    return jittered(delay, chance=chance) if retry.jitter else delay
