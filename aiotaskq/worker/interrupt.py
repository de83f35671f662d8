"""Raising an exception inside a coroutine at the point where it waits.

The only way to interrupt the wait of an asyncio task is to cancel it, and a cancellation carries no
reason. Here it is replaced by another exception at the border of the user's coroutine.

The coroutine may wait in a task group, a lock or the connection pool of a client library. These
clean up after one exception only, `CancelledError`; so the exception that is raised is one as well.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

from aiotaskq.errors import SoftTimeLimitExceeded

T = TypeVar("T")


class SoftCancelledError(SoftTimeLimitExceeded, asyncio.CancelledError):
    """A `SoftTimeLimitExceeded` that libraries treat as a cancellation.

    It has the name of the former, which users catch and which is stored.
    """


SoftCancelledError.__name__ = SoftCancelledError.__qualname__ = SoftTimeLimitExceeded.__name__
SoftCancelledError.__module__ = SoftTimeLimitExceeded.__module__


async def as_coroutine(awaitable: Awaitable[T]) -> T:
    """Return the value of anything that can be awaited, as a coroutine does."""
    return await awaitable


@types.coroutine
def interruptible(
    coroutine: Coroutine[Any, Any, T], instead: Callable[[], BaseException | None]
) -> Generator[Any, Any, T]:
    """Await a coroutine, and replace its cancellation.

    Args:
        coroutine: The coroutine.
        instead: Called when the coroutine is cancelled. Where it returns an exception, a
            `SoftCancelledError` with the same text is raised in the coroutine; where it returns
            None, the cancellation.
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
