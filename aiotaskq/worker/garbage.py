"""Garbage that tasks leave behind, freed before it fills the memory.

A task that keeps an exception in a local variable makes a cycle: the exception has a traceback,
this a frame, and that the variable. All that the frame holds stays in memory until the garbage
collector finds it. The collector counts objects, however large they are, and in the processes of
``aiotaskq worker`` it waits for many of them. So two more things are done here:

- `drop_tracebacks` opens the cycles of a task that has failed, once its failure was told.
- `GarbageWatch` runs the collector when the process has grown: for tasks that succeed, and for
  frames that only the collector finds.
"""

from __future__ import annotations

import gc

from aiotaskq.processes.operating_system import own_resident_memory

_LOOK_EVERY = 50  # tasks; a look takes a hundredth of the time that these take, at the least
_GROWTH = 64 * 1024 * 1024  # bytes by which a process may grow, or by a quarter if that is more

# Not by attribute: the class of an exception may have others of these names.
_cause = vars(BaseException)["__cause__"].__get__
_context = vars(BaseException)["__context__"].__get__
_members = vars(BaseExceptionGroup)["exceptions"].__get__


def drop_tracebacks(error: BaseException) -> None:
    """Drop the traceback of an exception, and of those that it came from or consists of."""
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        if id(one) not in seen:
            seen.add(id(one))
            BaseException.with_traceback(one, None)
            left += [other for other in (_cause(one), _context(one)) if other is not None]
            if isinstance(one, BaseExceptionGroup):
                left += _members(one)


class GarbageWatch:
    """Has the garbage collector look when the process has grown."""

    def __init__(self) -> None:
        self._left = _LOOK_EVERY
        self._bound: int | None = None  # bytes

    def note_end(self) -> None:
        """Note that a task has ended; collect garbage if it is time to."""
        self._left -= 1
        if not self._left:
            self._left = _LOOK_EVERY
            self._look()

    def _look(self) -> None:
        used = own_resident_memory()
        if self._bound is not None and used <= self._bound:
            return
        if self._bound is not None and gc.isenabled():
            gc.collect()
            used = own_resident_memory()
        self._bound = used + max(_GROWTH, used // 4)
