"""Pauses between attempts at something that fails for a while: growing, bounded and jittered.

Everything that tries again takes its pauses from here: the worker and the client while a server
is away, drivers that connect anew, the processes that are started again, and the retries of tasks.
One formula of growth and one of jitter, so that a cluster of programs behaves the same everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_MOST_DOUBLINGS = 60
"""2.0 ** 2000 raises OverflowError, and nothing limits how often something fails."""


def doubled(delay: float, times: int) -> float:
    """Return a delay in seconds, doubled so many times."""
    return delay * 2.0 ** min(times, _MOST_DOUBLINGS)


def jittered(delay: float, *, chance: Callable[[], float] = random.random) -> float:
    """Return a random time from half of a delay to the whole of it.

    Callers that failed together do not come back together, and none comes back at once.
    """
    return delay * (0.5 + chance() / 2)


class Backoff:
    """The pauses between attempts at one thing.

    The first one is `first`, each further one twice as long, `longest` at most; `reset` begins
    anew.

    Args:
        first: Seconds.
        longest: Seconds.
        jitter: Whether `next` returns a random part of the pause; see `jittered`.
        chance: Returns a random number from 0 to 1.

    Example:
        >>> backoff = Backoff(1.0, 5.0, jitter=False)
        >>> [backoff.next() for _ in range(4)]
        [1.0, 2.0, 4.0, 5.0]
        >>> backoff.reset()
        >>> backoff.next()
        1.0
    """

    __slots__ = ("_chance", "_first", "_jitter", "_longest", "failures")

    def __init__(
        self,
        first: float,
        longest: float,
        *,
        jitter: bool = True,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first = first
        self._longest = longest
        self._jitter = jitter
        self._chance = chance
        self.failures = 0
        """Calls of `next` since the beginning or the last `reset`."""

    def next(self) -> float:
        """Note one more failure and return the seconds to wait."""
        pause = min(doubled(self._first, self.failures), self._longest)
        self.failures += 1
        return jittered(pause, chance=self._chance) if self._jitter else pause

    def reset(self) -> None:
        """Note a success: the next pause is the first one again."""
        self.failures = 0
