"""Forks: a lock that imports of drivers hold, and hooks of drivers around a fork.

Any thread of a program may fork at any time. Two rules keep a child usable:

- A fork waits for an import of a driver to end (`importing`). A child that was forked in the middle
  of one would wait for its end for ever.
- A driver that has locks or connections which a child must not inherit in use registers hooks here,
  and not with `os.register_at_fork`. The system takes its list of hooks when a fork *begins*. A
  fork that begins during an import, waits for it, and then goes on would not call the hooks which
  that import has registered, while another thread already uses the driver. The list here is read
  after the wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple


class ForkHooks(NamedTuple):
    """The functions of a driver that are called around a fork."""

    before: Callable[[], None]
    after: Callable[[], None]  # in the parent and in the child


importing = threading.RLock()
"""Held during the import of a driver, and during a fork."""

_registered: list[ForkHooks] = []
_under_way: list[ForkHooks] = []  # whose `before` was called for the present fork


def register(before: Callable[[], None], after: Callable[[], None]) -> None:
    """Have functions called around each fork that has not got past its wait yet.

    Args:
        before: Called in the thread that forks.
        after: Called in the same thread, in the parent and in the child.
    """
    _registered.append(ForkHooks(before, after))


def _before_fork() -> None:
    importing.acquire()
    for hooks in _registered:
        hooks.before()
        _under_way.append(hooks)


def _after_fork() -> None:
    while _under_way:
        _under_way.pop().after()
    importing.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )
