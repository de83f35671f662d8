"""Forks: cutting a child off from its parent, and hooks around a fork.

Any thread of a program may fork at any time: `os.fork`, `multiprocessing`, a pool of processes, a
subprocess with a `preexec_fn`. The child is a copy of one thread. All of the rest it shares with a
process that goes on, and this module is the one place where that is put right. In the child:

- *Signals.* An event loop is woken by a file descriptor into which the kernel's signals are noted.
  A child that kept it would note its own signals there, and stop its parent's loop. So it is
  taken away, and the handlers that event loops have set are replaced by the system's own. Where a
  task forks, that holds for every handler of a stop signal: it belongs to the program that runs the
  task. Otherwise handlers stay, as users expect. A signal that arrives between the fork and this
  step must not be noted either, so these signals are held back from before the fork.
- *Connections.* A connection that a child holds open is not closed for the server when its parent
  dies, and a byte that the child writes to it corrupts it. `keep_private` names a file descriptor
  that becomes a dead end in each child.
- *Event loops.* The loop of `guard` gets a poller of its own, as changes to a shared one are
  changes of the parent's; and a child that comes back into it is ended, as it would run everything
  a second time. `generation` tells code that calls a user's function whether it is in a child.

Imports of drivers and a fork wait for each other (`importing`): a child that was forked in the
middle of an import would wait for its end for ever. Modules register hooks here (`register`), and
not with `os.register_at_fork`. The system takes its list of hooks when a fork *begins*. A fork that
begins during an import, waits for it, and then goes on would not call the hooks which that import
has registered, while another thread already uses the driver. The list here is read after the wait.

A signal handler may raise an exception in the middle of all this, as that of Ctrl-C does. Python
writes such an exception to stderr and forks all the same. So a fork is noted first, and then each
thing that is done for it: whatever was done is undone, in the parent and in the child.

Limit: C code that forks by itself calls no hook. `subprocess` without a `preexec_fn` is such code,
and executes another program at once.
"""

from __future__ import annotations

import _socket
import asyncio
import contextlib
import functools
import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

from aiotaskq.native import make_reentrant_lock

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals that stop a program."""

generation = 0
"""The number of forks between this process and the one that has imported this module."""

importing = make_reentrant_lock()
"""Held during the import of a driver, and during a fork."""


class ForkHooks(NamedTuple):
    """Functions that are called around a fork; see `register`."""

    before: Callable[[], None] | None
    after: Callable[[], None] | None
    in_child: Callable[[], None] | None


class _Fork:
    """A fork that is under way in this thread, and the steps done for it so far."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.loop = asyncio._get_running_loop()
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # before signals are held back
        self.importing = _hold_importing()
        self.hooks: list[ForkHooks] = []  # whose `before` has ended
        self.replaced: list[int] = []  # signals whose handlers the child does not keep
        self.prepared = False  # all is done that is done before the fork


def _hold_importing() -> Generator[None]:
    """Hold `importing` from the first step to the second.

    No signal is handled between the two ends of the beginning of a `with` block. So this is in its
    second step if and only if it holds the lock.
    """
    with importing:
        yield


_registered: list[ForkHooks] = []
_under_way: list[_Fork] = []
_private: dict[int, tuple[int, int]] = {}  # file descriptors, with the devices and inodes
_guarded: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
_runs_task: list[Callable[[], object]] = []


def register(
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
    *,
    in_child: Callable[[], None] | None = None,
) -> None:
    """Have functions called around each fork that has not got past its wait yet.

    Args:
        before: Called in the thread that forks. Where it raises, it has undone what it did.
        after: Called in the same thread, in the parent and in the child, if `before` has ended.
        in_child: Called after the fork, in the child alone.
    """
    _registered.append(ForkHooks(before, after, in_child))


def keep_private(fd: int) -> None:
    """Have a socket or pipe replaced by a dead end in each child that is forked.

    It need not be told when it is closed: a file descriptor that means something else by then is
    left alone.
    """
    if fd >= 0:
        found = os.fstat(fd)
        _private[fd] = (found.st_dev, found.st_ino)


def keep_transport_private(transport: Any) -> None:
    """Do the same for the socket of an asyncio transport, if it has one."""
    own = transport.get_extra_info("socket")
    if own is not None:
        keep_private(own.fileno())


def guard(loop: asyncio.AbstractEventLoop) -> None:
    """Have a child that is forked in this event loop ended before it runs the loop on."""
    _guarded.add(loop)


def when_task_runs(predicate: Callable[[], object]) -> None:
    """Register the function that says whether a task runs in this thread."""
    _runs_task.append(predicate)


def end_child(before: int, error: BaseException | None = None) -> None:
    """End this process, if it is a child that a user's function has forked.

    It has the exit status that a program would have. Nothing of the parent's is closed: no exit
    function runs, as in children of `multiprocessing`.

    Args:
        before: The `generation` before the function was called.
        error: The exception that the function has raised.
    """
    if generation != before:
        _leave(error)


def _leave(error: BaseException | None) -> NoReturn:
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    elif error is not None:
        status = 1
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            stream.flush()
    logging.shutdown()
    os._exit(status & 0xFF)


# --- around a fork --------------------------------------------------------------------------------


def _before_fork() -> None:
    fork = _Fork()
    try:
        _under_way.append(fork)
        _prepare(fork)
    finally:
        fork.prepared = True


def _prepare(fork: _Fork) -> None:
    try:
        next(fork.importing)
        for hooks in _registered:
            if hooks.before is not None:
                hooks.before()
            fork.hooks.append(hooks)
    finally:
        # Last: no signal is held back while a hook waits. It would not help either: the kernel
        # gives the signal to another thread, and Python calls its handler in this one.
        _hold_signals_back(fork)


def _hold_signals_back(fork: _Fork) -> None:
    """Keep the child, which has this thread alone, from handling a signal before it is cut off."""
    handled = [int(number) for number in signal.valid_signals() if callable(_handler(number))]
    fork.replaced = [number for number in handled if _is_replaced(number)]
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)


def _handler(number: int) -> Any:
    """Return the handler of a signal; a number or None: it is none of Python's."""
    handler: Any = signal.getsignal(number)
    return handler


def _is_replaced(number: int) -> bool:
    """Return whether a child does not keep the handler of a signal."""
    handler = _handler(number)
    if not callable(handler) or handler is signal.default_int_handler:
        return False
    if number in STOP_SIGNALS and any(runs() for runs in _runs_task):
        return True
    if isinstance(handler, functools.partial):  # asyncio's own Ctrl-C
        handler = handler.func
    owner = getattr(handler, "__self__", None)
    return isinstance(owner, asyncio.AbstractEventLoop | asyncio.Runner) or (
        handler is getattr(asyncio.unix_events, "_sighandler_noop", None)
    )


def _after_fork_in_parent() -> None:
    fork = _own_fork()
    if fork is not None:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, fork.mask)
        finally:
            _undo(fork)
            _under_way.remove(fork)


def _own_fork() -> _Fork | None:
    """Return the fork of this thread; None: it was undone already, or not even noted.

    A fork in a signal handler may come in the middle of the preparation of another one.
    """
    for fork in reversed(_under_way.copy()):
        if fork.thread == threading.get_ident():
            return fork if fork.prepared else None
    return None


def _undo(fork: _Fork) -> None:
    """Undo what was done before the fork, and is not undone yet."""
    try:
        while fork.hooks:
            hooks = fork.hooks[-1]
            del fork.hooks[-1]
            if hooks.after is not None:
                hooks.after()
    finally:
        fork.importing.close()


def _after_fork_in_child() -> None:
    global generation
    generation += 1
    signal.set_wakeup_fd(-1)
    fork = _own_fork()
    if fork is None:  # an exception of a signal handler came before all else
        fork = _Fork()
        _hold_signals_back(fork)
    # The other threads are not here, and new ones may have their numbers.
    _under_way[:] = [one for one in _under_way if one.thread == fork.thread and one is not fork]
    for number in fork.replaced:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    try:
        _cut_off()
    finally:
        _undo(fork)
        if not importing._is_owned():  # the wait for it was interrupted, maybe: nobody has it here
            importing._at_fork_reinit()
        for hooks in _registered:
            if hooks.in_child is not None:
                hooks.in_child()
        if fork.loop is not None and fork.loop in _guarded:
            fork.loop.call_soon(_come_back)
        # Last: a signal that has come since the fork is handled now. Ctrl-C ends the child, as an
        # exception would be lost here.
        ctrl_c = signal.getsignal(signal.SIGINT)
        if ctrl_c is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, fork.mask)
        if ctrl_c is signal.default_int_handler:
            signal.signal(signal.SIGINT, ctrl_c)


def _cut_off() -> None:
    """Give the child pollers of its own, and dead ends in place of what is the parent's."""
    for loop in list(_guarded):
        poller = _poller(loop)
        if poller is not None:
            with contextlib.suppress(OSError), select.epoll() as own:
                os.dup2(own.fileno(), poller, inheritable=False)
    ours = [fd for fd, identity in _private.items() if _is_still(fd, identity)]
    _private.clear()
    if not ours:
        return
    try:
        dead_end, other = _socket.socketpair()  # also where Python's own sockets are patched
    except OSError:  # too many files are open: better none than the parent's
        for fd in ours:
            os.close(fd)
        return
    other.close()
    for fd in ours:
        os.dup2(dead_end.fileno(), fd, inheritable=False)
    dead_end.close()


def _is_still(fd: int, identity: tuple[int, int]) -> bool:
    try:
        found = os.fstat(fd)
    except OSError:  # it was closed
        return False
    return (found.st_dev, found.st_ino) == identity


def _poller(loop: Any) -> int | None:
    """Return the file descriptor by which an event loop waits; None: a fork does not share it."""
    if loop.is_closed() or not hasattr(select, "epoll"):
        return None
    if hasattr(loop, "_get_backend_id"):  # uvloop
        return int(loop._get_backend_id())
    selector: Any = getattr(loop, "_selector", None)
    return int(selector.fileno()) if hasattr(selector, "fileno") else None


def _come_back() -> None:
    _leave(
        SystemExit(
            f"process {os.getpid()}, a fork, came back into the event loop of its parent and was"
            " ended: let such a child end with os._exit()"
        )
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
    # Once more: a signal that comes during the fork is handled at the first step of the next
    # function of Python. If its handler raises, that function is not run.
    os.register_at_fork(after_in_parent=_after_fork_in_parent)
