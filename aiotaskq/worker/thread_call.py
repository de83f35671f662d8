"""`ThreadCall`: a call of a plain function in a thread, in which an exception can be raised.

::

    waiting ──▶ begun: the function runs ──▶ over ──▶ shut: the thread goes on to other code
       │                     ▲                             ▲
       └─ raise: it is ──────┴─ raise: at the next         └─ one that came too late is cleared
          not called            instruction of Python

The interpreter raises such an exception between two instructions of the thread, whatever code the
thread runs by then. So the call sees to it that nothing is raised outside of it:

- Whoever raises does so under a lock, and only if the function is not over. The thread takes the
  same lock when the function is over, and never gives it back: from then on nothing is raised, and
  what has been and was not heard yet is cleared.
- Between the end of the function and that moment at most two exceptions can arrive: one that was
  sent before, and one that is just being sent. Each may hit the code that ends the call, which is
  therefore tried three times.
- The interpreter looks for such exceptions only when it calls or jumps back, and the assignment to
  `_over` does neither.

C code is not interrupted: the exception is raised when it returns. One that is raised in a
destructor or a callback of the garbage collector is written to stderr by Python, and goes no
further.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from _thread import RLock  # the function of `threading` takes longer to make the same
from collections.abc import Callable, Mapping
from typing import Any

_set_async_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc


class ThreadCall:
    """One call of a function, which a thread makes and another thread may interrupt.

    Args:
        function: The function. It runs in a copy of the context in which this object is made.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    __slots__ = (
        "_args",
        "_context",
        "_function",
        "_heard",
        "_instead",
        "_kwargs",
        "_lock",
        "_over",
        "_sent",
        "_thread",
    )

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._function = function
        self._args = args
        self._kwargs = kwargs
        self._context = contextvars.copy_context()
        self._lock = RLock()  # taken again where the thread was interrupted after it
        self._thread: int | None = None  # the one that makes the call; None: it has not begun
        self._instead: Callable[[], BaseException] | None = None  # raised in place of the call
        self._sent = False
        self._heard = False  # what was sent last
        self._over = False

    @property
    def unheard(self) -> bool:
        """The state of an exception: True if it was sent and not raised yet, as C code runs."""
        return self._sent and not self._heard and not self._over

    @property
    def over(self) -> bool:
        """The state of the function: True once it has ended."""
        return self._over

    def interrupt(self, error: Callable[[], BaseException]) -> None:
        """Raise an exception in the function; do nothing if it has ended.

        A function that was not called yet is not called any more. An exception that was sent
        before, and not raised yet, is replaced.

        Args:
            error: Makes the exception; called in the thread of the function.
        """
        self._instead = error  # before looking for the thread, which looks in the other order
        thread = self._thread
        if thread is None or not self._lock.acquire(blocking=False):
            return
        try:
            if not self._over:
                self._sent, self._heard = True, False
                kind = _class_of(lambda: self._hear(error))
                _set_async_exception(ctypes.c_ulong(thread), ctypes.py_object(kind))
        finally:
            self._lock.release()

    def _hear(self, error: Callable[[], BaseException]) -> BaseException:
        self._heard = True
        return error()

    def __call__(self) -> Any:
        """Call the function and return its value. Once this has ended, nothing is raised."""
        try:
            try:
                self._thread = threading.get_ident()
                if self._instead is not None:
                    raise self._instead()
                return self._context.run(self._function, *self._args, **self._kwargs)
            finally:
                self._over = True
        finally:
            self._over = True  # an exception may have arrived just before
            try:
                self._shut()
            except BaseException:  # it was meant for the function, which is over
                try:
                    self._shut()
                except BaseException:  # likewise; there is no third
                    self._shut()

    def _shut(self) -> None:
        self._lock.acquire()  # for ever
        if self._sent:
            _set_async_exception(ctypes.c_ulong(threading.get_ident()), None)


def _class_of(error: Callable[[], BaseException]) -> type[BaseException]:
    """Return a class that makes the exception: the interpreter takes no instance."""

    class Interruption(BaseException):
        def __new__(cls, *made: BaseException) -> Any:
            # Python 3.11 calls it once more, with what it has returned.
            return made[0] if made else error()

    return Interruption
