"""Raising something inside a coroutine, where it waits.

Cancelling an asyncio task is the one way to interrupt what it waits for, and it says nothing but
"cancelled". Here that is turned into another exception at the border of the user's coroutine.

What waits may be a task group, a lock or a client's pool of connections. These know of one
exception only that may interrupt them, and clean up after that: so what is raised is one as well.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from aiotaskq.errors import SoftTimeLimitExceeded

T = TypeVar("T")


class SoftCancelledError(SoftTimeLimitExceeded, asyncio.CancelledError):
    """`SoftTimeLimitExceeded`, for what only cleans up after a cancellation.

    It goes by the name of the former, which is what users catch, and what is stored.
    """


SoftCancelledError.__name__ = SoftCancelledError.__qualname__ = SoftTimeLimitExceeded.__name__
SoftCancelledError.__module__ = SoftTimeLimitExceeded.__module__


@types.coroutine
def interruptible(
    coroutine: Coroutine[Any, Any, T], instead: Callable[[], BaseException | None]
) -> Generator[Any, Any, T]:
    """Await a coroutine; where it is cancelled, raise in it what `instead` returns, if anything.

    What it raises then is a `SoftCancelledError` of the same words.
    """
    value: Any = None
    error: BaseException | None = None
    try:
        while True:
            try:
                awaited = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # a T: the coroutine returned it
            value = error = None
            try:
                value = yield awaited
            except asyncio.CancelledError as cancelled:
                told = instead()
                error = cancelled if told is None else SoftCancelledError(*told.args)
            except BaseException as raised:
                error = raised
    finally:
        coroutine.close()
