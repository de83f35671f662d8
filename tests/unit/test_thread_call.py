"""`ThreadCall`: exceptions are raised in its function, and nowhere else."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from aiotaskq.worker.thread_call import ThreadCall


class ToldError(Exception):
    """Raised in a function from outside."""


def told() -> ToldError:
    return ToldError("stop")


def count(times: int) -> int:
    total = 0
    for number in range(times):
        total += number
    return total


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns after each instruction or so.

    No garbage is collected meanwhile: Hypothesis is called with each collection, and Python only
    reports what is raised there.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    gc.disable()
    yield
    gc.enable()
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_an_exception_that_comes_too_late_is_raised_nowhere() -> None:
    """A thread makes short calls one after another, all of them interrupted at any moment."""
    escaped: list[BaseException] = []
    ended, interrupted, stop = 0, 0, False
    current: ThreadCall | None = None

    def work() -> None:
        nonlocal ended, interrupted, current
        try:
            while not stop:
                current = ThreadCall(count, (ended % 200,), {})
                try:
                    current()
                    ended += 1
                except ToldError:
                    interrupted += 1
                count(20)  # not the function's: nothing may be raised here
        except BaseException as error:
            escaped.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    end = time.monotonic() + 20
    while thread.is_alive() and time.monotonic() < end and (ended < 500 or interrupted < 50):
        if current is not None:
            current.interrupt(told)
    stop = True
    thread.join()
    assert escaped == []
    assert ended >= 500
    assert interrupted >= 50


def test_a_call_that_was_interrupted_before_it_began_is_not_made() -> None:
    called: list[int] = []
    call = ThreadCall(called.append, (1,), {})
    call.interrupt(told)
    with pytest.raises(ToldError, match="stop"):
        call()
    assert called == []
    assert call.over


def test_nothing_is_raised_after_the_end() -> None:
    call = ThreadCall(count, (), {"times": 3})
    assert call() == 3
    call.interrupt(told)
    assert count(1000) == 499_500


def test_a_later_exception_replaces_one_that_was_not_raised_yet() -> None:
    begun, go = threading.Event(), threading.Event()
    raised: list[str] = []

    def wait() -> None:
        begun.set()
        try:
            go.wait(30)  # C code
        except Exception as error:
            raised.append(str(error))
            count(100)

    call = ThreadCall(wait, (), {})
    thread = threading.Thread(target=call)
    thread.start()
    begun.wait(30)
    call.interrupt(told)
    call.interrupt(lambda: ToldError("at once"))
    go.set()
    thread.join()
    assert raised == ["at once"]
