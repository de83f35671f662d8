"""When a failed task runs again. Pure: the decision is a function of what happened."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from aiotaskq.errors import ConfigError
from aiotaskq.message import RetryPolicy

Backoff: TypeAlias = Literal["exponential", "linear", "constant"] | Callable[[int], float]


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How often, how soon and after which exceptions a failed task runs again.

    Args:
        max_attempts: Runs in all, the first included.
        delay: Seconds before the second attempt.
        backoff: How the delay grows from there: ``"exponential"`` doubles it,
            ``"linear"`` adds `delay` each time, ``"constant"`` keeps it, and a function gets the
            number of the attempt that failed and returns seconds.
        max_delay: The most seconds to wait.
        jitter: Wait a random time between half and the whole of the delay, so that what failed
            together does not come back together.
        on: Exceptions worth another attempt; subclasses are included.
        never_on: Exceptions that are not, though `on` names a base of theirs.
    """

    max_attempts: int = 3
    delay: float = 1.0
    backoff: Backoff = "exponential"
    max_delay: float = 600.0
    jitter: bool = True
    on: tuple[type[BaseException], ...] = (Exception,)
    never_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if type(self.max_attempts) is not int or self.max_attempts < 1:
            raise ConfigError(
                f"max_attempts is {self.max_attempts}, and the first run counts: 1 is the least"
            )
        if not (0 <= self.delay < math.inf and 0 <= self.max_delay < math.inf):
            raise ConfigError("delay and max_delay are seconds, 0 or more")
        if not callable(self.backoff) and self.backoff not in _GROWTH:
            raise ConfigError(
                f"backoff is {self.backoff!r}; it may be {', '.join(map(repr, _GROWTH))}"
                " or a function of the attempt"
            )
        for name in ("on", "never_on"):
            kinds: Any = getattr(self, name)  # whatever it was given
            if not (isinstance(kinds, tuple) and all(isinstance(kind, type) for kind in kinds)):
                raise ConfigError(f"{name} is {kinds!r}; it must be a tuple of exception types")

    def to_policy(self) -> RetryPolicy:
        """Return the form that travels in a message, for a call with a policy of its own.

        Raises:
            ConfigError: It holds a function or exception types, which cannot travel.
        """
        if callable(self.backoff) or self.on != (Exception,) or self.never_on:
            raise ConfigError(
                "a Retry given for one call travels in the message, so it cannot hold a function"
                " or exception types: give those where the task is defined"
            )
        return RetryPolicy(
            max_attempts=self.max_attempts,
            delay=self.delay,
            backoff=self.backoff,
            max_delay=self.max_delay,
            jitter=self.jitter,
        )


_GROWTH: dict[str, Callable[[float, int], float]] = {
    # Clamped: 2.0 ** 2000 raises OverflowError, and nothing limits max_attempts.
    "exponential": lambda delay, attempt: delay * 2.0 ** min(attempt - 1, 60),
    "linear": lambda delay, attempt: delay * attempt,
    "constant": lambda delay, attempt: delay,
}

NEVER = Retry(max_attempts=1)


def for_call(policy: RetryPolicy, task: Retry) -> Retry:
    """Return the task's `Retry` with the numbers that one call asked for.

    They came in a message, so that what makes no sense is put right rather than refused.
    """
    return Retry(
        max_attempts=max(1, policy.max_attempts),
        delay=_seconds(policy.delay),
        backoff=policy.backoff if policy.backoff in _GROWTH else "exponential",  # type: ignore[arg-type]  # it is one of them
        max_delay=_seconds(policy.max_delay),
        jitter=policy.jitter,
        on=task.on,
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
    if attempt >= retry.max_attempts:
        return None
    if not isinstance(error, retry.on) or isinstance(error, retry.never_on):
        return None
    if callable(retry.backoff):
        delay = retry.backoff(attempt)
    else:
        delay = _GROWTH[retry.backoff](retry.delay, attempt)
    delay = min(max(0.0, delay), retry.max_delay)  # in this order, NaN becomes 0
    return delay * (0.5 + chance() / 2) if retry.jitter else delay
