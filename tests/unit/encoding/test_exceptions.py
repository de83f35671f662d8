"""Exceptions as data, and the exceptions that callers get."""

from __future__ import annotations

import asyncio
import builtins
import copy
import json
import pickle
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import pytest
from msgspec import Raw

from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.encoding.exceptions import describe, encode_error, rebuild, to_exception
from aiotaskq.errors import (
    BrokerUnavailable,
    ConfigError,
    Reject,
    ResultTimeout,
    RetryLater,
    Snooze,
    TaskFailed,
    TaskRevoked,
    TimeLimitExceeded,
)
from aiotaskq.worker.execution import OutcomeExists
from aiotaskq.worker.process_pool import RemoteFailure


class UserError(Exception):
    """An exception of a user's module that is imported here."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code

    class Inner(KeyError):
        pass


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class GuardedError(Exception):
    @property
    def task_id(self) -> str:
        raise RuntimeError("guarded")


class NewError(Exception):
    def __new__(cls, one: int, two: int) -> Self:
        return super().__new__(cls, one, two)


class ProudError(Exception):
    def __init_subclass__(cls) -> NoReturn:
        raise RuntimeError("nobody inherits from me")


class HostileError(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")

    __repr__ = __str__


class HostileArguments(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]  # that is the point
        raise RuntimeError("no arguments")


class SlottedError(OSError):
    __slots__ = ("code",)

    code: int


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def travel(error: BaseException) -> TaskFailed:
    """Return the exception that the caller gets."""
    raw, text = describe(raised(error))
    fields = json.loads(bytes(raw))
    assert list(fields)[:3] == ["exc_type", "exc_message", "exc_module"]
    return rebuild(raw, "the-id", text)


def unicode_error() -> UnicodeDecodeError:
    with pytest.raises(UnicodeDecodeError) as info:
        b"\xff".decode()
    return info.value


# --- every builtin ------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "UnicodeDecodeError": ("utf-8", b"\xff", 0, 1, "bad"),
    "UnicodeEncodeError": ("utf-8", "\ud800", 0, 1, "bad"),
    "UnicodeTranslateError": ("\ud800", 0, 1, "bad"),
    "ExceptionGroup": ("several", [ValueError(1)]),
    "BaseExceptionGroup": ("several", [KeyboardInterrupt()]),
}
BUILTINS = sorted(
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
)


@pytest.mark.parametrize("name", BUILTINS)
def test_every_builtin_travels_with_its_name_and_text(name: str) -> None:
    kind = getattr(builtins, name)
    error = kind(*ARGUMENTS.get(name, ("the message",)))
    failure = travel(error)
    assert failure.exc_type == kind.__name__
    assert failure.exc_module == "builtins"
    assert failure.exc_message == str(error).encode("utf-8", "backslashreplace").decode()
    assert failure.exc_message in str(failure)
    assert failure.task_id == "the-id"
    again = pickle.loads(pickle.dumps(failure))
    assert type(again) is type(failure)
    assert (str(again), vars(again)) == (str(failure), vars(failure))
    if not isinstance(failure, BaseExceptionGroup):
        assert again.args == failure.args


NOT_MIXED = {
    "BaseException",
    "BaseExceptionGroup",
    "Exception",
    "GeneratorExit",
    "KeyboardInterrupt",
    "StopAsyncIteration",
    "StopIteration",
    "SystemExit",
}


@pytest.mark.parametrize("name", BUILTINS)
def test_a_builtin_is_caught_as_itself_unless_that_would_harm(name: str) -> None:
    kind = getattr(builtins, name)
    failure = travel(kind(*ARGUMENTS.get(name, ("the message",))))
    assert (name not in NOT_MIXED) is (type(failure) is not TaskFailed)
    if name not in NOT_MIXED:
        with pytest.raises(kind):
            raise failure
    else:
        assert str(failure).startswith(f"{kind.__name__}: ")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("x"), "'x'"),
        (FileNotFoundError(2, "No such file", "f"), "[Errno 2] No such file: 'f'"),
        (ValueError("a", 1), "('a', 1)"),
        (ValueError(), ""),
        (ValueError(5), "5"),
        (ValueError(None), "None"),
        (ValueError("ü\x00\n"), "ü\x00\n"),
        (ValueError("\ud800"), "\\ud800"),
        (ValueError(float("nan")), "nan"),
        (ValueError(object), "<class 'object'>"),
        (ValueError(2**70), str(2**70)),
        (ValueError([1, 2]), "[1, 2]"),
    ],
    ids=repr,
)
def test_the_message_is_the_result_of_str(error: Exception, text: str) -> None:
    assert travel(error).exc_message == text


def test_a_plain_argument_rests_as_it_is() -> None:
    raw, _ = describe(ValueError(5))
    assert json.loads(bytes(raw)) == {
        "exc_type": "ValueError",
        "exc_message": [5],
        "exc_module": "builtins",
    }


# --- exceptions of users ------------------------------------------------------------------------


def test_a_loaded_type_of_the_users_is_caught_as_itself() -> None:
    failure = travel(UserError(5, reason="full"))
    with pytest.raises(UserError) as caught:
        raise failure
    assert isinstance(caught.value, TaskFailed)
    assert caught.value.exc_module == __name__
    assert caught.value.exc_message == "(5, 'full')"


def test_a_nested_type_is_found() -> None:
    failure = travel(UserError.Inner("x"))
    assert isinstance(failure, UserError.Inner)
    assert isinstance(failure, KeyError)
    assert failure.exc_type == "UserError.Inner"


def test_a_local_type_travels_by_its_name() -> None:
    class LocalError(Exception):
        pass

    failure = travel(LocalError("x"))
    assert type(failure) is TaskFailed
    assert failure.exc_type.endswith("<locals>.LocalError")


def test_a_type_that_is_not_loaded_here_is_not_imported() -> None:
    unloaded = "this"  # a module that prints when it is imported
    assert unloaded not in sys.modules
    failure = rebuild(Raw(b'{"exc_type":"s","exc_message":["x"],"exc_module":"this"}'), "1", None)
    assert type(failure) is TaskFailed
    assert unloaded not in sys.modules


def test_a_module_that_imports_on_demand_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    lazy = types.ModuleType("lazy_module")
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]  # PEP 562
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    rebuild(Raw(b'{"exc_type":"a.b","exc_message":[],"exc_module":"lazy_module"}'), "1", None)
    assert asked == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "print"),
        ("builtins", "int"),
        ("builtins", "object.__class__"),
        ("sys", "modules"),
        ("", ""),
        ("os", "path.join"),
        (__name__, "pytest.raises"),
        ("builtins", "é.."),
    ],
)
def test_a_name_of_something_else_gives_the_plain_failure(module: str, name: str) -> None:
    failure = rebuild(encode_error(name, "x", module), "1", None)
    assert type(failure) is TaskFailed
    assert (failure.exc_type, failure.exc_module) == (name, module)


@pytest.mark.parametrize(
    "error",
    [FrozenError(3), GuardedError("x"), NewError(1, 2), ProudError("x"), SlottedError("x")],
    ids=lambda error: type(error).__name__,
)
def test_unusual_types_still_give_a_failure_with_all_facts(error: Exception) -> None:
    failure = travel(error)
    assert isinstance(failure, TaskFailed)
    assert failure.exc_type == type(error).__name__
    assert failure.remote_traceback is not None
    pickle.loads(pickle.dumps(failure))
    copy.copy(failure)


def test_a_frozen_dataclass_is_caught_as_itself() -> None:
    with pytest.raises(FrozenError):
        raise travel(FrozenError(3))


class UserVerdict(Reject):
    """A verdict with a type of the user's."""


@pytest.mark.parametrize(
    "error",
    [
        ResultTimeout("x"),
        TaskRevoked("x"),
        TimeLimitExceeded("x"),
        Reject("x"),
        Snooze(1),
        RetryLater(1),
        BrokerUnavailable("x"),
        ConfigError("x"),
        UserVerdict("x"),
        OutcomeExists(),
        RemoteFailure(Raw(b"null"), ""),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
        SystemExit(1),
        GeneratorExit(),
        StopAsyncIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_would_act_on_the_caller_is_a_plain_failure(error: BaseException) -> None:
    failure = travel(error)
    assert type(failure) is TaskFailed
    assert failure.exc_type == type(error).__name__


def test_in_another_process_of_the_same_run_our_own_errors_are_themselves() -> None:
    raw, text = describe(raised(TimeLimitExceeded("x")))
    assert isinstance(rebuild(raw, "1", text, own=True), TimeLimitExceeded)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError("a", 1, None, 2.5, True),
        ValueError([1, {"a": [2]}]),
        ValueError(),
        UserError(5, reason="full"),
        FileNotFoundError(2, "No such file", "f"),
    ],
    ids=repr,
)
def test_the_arguments_are_as_they_were_raised(error: Exception) -> None:
    failure = travel(error)
    assert failure.args == error.args
    assert copy.copy(failure).args == error.args
    assert str(failure) == failure.exc_message


@pytest.mark.parametrize(
    "args",
    [("a", object()), ("\ud800", 1), (float("nan"), 1), (2**70, 1), ("x" * 20_000, 1), ((1,), 2)],
    ids=range(6),
)
def test_arguments_that_are_no_plain_data_are_told_by_the_message(args: tuple[Any, ...]) -> None:
    failure = travel(ValueError(*args))
    assert failure.args == (failure.exc_message,)


def test_attributes_are_carried_as_far_as_they_are_plain_data() -> None:
    failure: Any = travel(UserError(5, reason="full"))
    assert failure.code == 5
    error: Any = UserError(1, reason="r")
    error.details = {"rows": [1, 2]}
    error._private = "kept"
    error.lock = object()
    error.long = "x" * 20_000
    error.task_id = "of another"
    error.__notes__ = ["a note"]
    failure = travel(error)
    assert (failure.details, failure._private) == ({"rows": [1, 2]}, "kept")
    assert not hasattr(failure, "lock")
    assert not hasattr(failure, "long")
    assert failure.task_id == "the-id"
    assert "a note" in failure.remote_traceback


def test_attributes_in_slots_are_carried_and_pickled() -> None:
    error = SlottedError(2, "No such file", "f")
    error.code = 7
    for failure in (travel(error), pickle.loads(pickle.dumps(travel(error)))):
        assert isinstance(failure, SlottedError)
        assert (failure.errno, failure.strerror, failure.filename) == (2, "No such file", "f")
        assert failure.code == 7


def test_no_code_of_a_users_type_runs_for_an_attribute_that_a_payload_names() -> None:
    raw = (
        b'{"exc_type":"GuardedError","exc_message":["x"],"exc_module":"%s","exc_attributes":'
        b'{"task_id":"y","guarded":1,"__class__":"z","__dict__":{},"args":5}}'
    )
    failure = rebuild(Raw(raw % __name__.encode()), "the-id", None)
    assert isinstance(failure, GuardedError)
    assert vars(failure)["task_id"] == "the-id"
    assert vars(failure)["guarded"] == 1
    assert "__class__" not in vars(failure)


def test_the_members_of_a_group_are_failures_of_their_types() -> None:
    members: list[Exception] = [ValueError(1), ExceptionGroup("more", [KeyError("x")])]
    error = ExceptionGroup("several", members)
    error.add_note("a note")
    for failure in (travel(error), pickle.loads(pickle.dumps(travel(error)))):
        assert isinstance(failure, ExceptionGroup)
        assert isinstance(failure, TaskFailed)
        assert failure.message == "several"
        first, second = failure.exceptions
        assert isinstance(first, ValueError)
        assert isinstance(first, TaskFailed)
        assert first.args == (1,)
        assert isinstance(second, ExceptionGroup)
        assert isinstance(second.exceptions[0], KeyError)
        caught: list[BaseException] = []
        try:
            raise failure
        except* KeyError as group:
            caught += group.exceptions
        except* ValueError as group:
            caught += group.exceptions
        assert len(caught) == 2


def test_a_member_of_a_group_that_would_act_on_the_caller_is_a_plain_failure() -> None:
    failure = travel(ExceptionGroup("several", [Reject("x"), ResultTimeout("y")]))
    assert isinstance(failure, ExceptionGroup)
    assert [type(one) for one in failure.exceptions] == [TaskFailed, TaskFailed]


def test_a_group_in_groups_is_described_within_limits() -> None:
    error: Any = ValueError(1)
    for _ in range(50):
        error = ExceptionGroup("deep", [error])
    raw, _ = describe(error)
    assert len(bytes(raw)) < 10_000
    raw, _ = describe(ExceptionGroup("wide", [ValueError(n) for n in range(10_000)]))
    assert len(bytes(raw)) < 100_000
    assert isinstance(rebuild(raw, "1", None), ExceptionGroup)


def test_a_failure_of_a_failure_is_a_failure() -> None:
    again = travel(travel(ZeroDivisionError("division by zero")))
    assert type(again) is TaskFailed
    assert "division by zero" in str(again)


# --- hostile ones -------------------------------------------------------------------------------


def strange_traceback() -> BaseException:
    """Return an error of code whose module has no name."""
    namespace: dict[str, Any] = {"__name__": None}
    exec("def fail(): raise ValueError('x')", namespace)
    return below(namespace["fail"])


def below(call: Callable[[], object]) -> BaseException:
    """Return the exception of a call, without the frame of this function."""
    with pytest.raises(ValueError, match="x") as info:
        call()
    frames = info.value.__traceback__
    while frames is not None and frames.tb_frame.f_code is not call.__code__:
        frames = frames.tb_next
    return info.value.with_traceback(frames)


@pytest.mark.parametrize(
    "make",
    [
        lambda: HostileError("x"),
        lambda: HostileArguments("x"),
        lambda: ValueError(10**5000),
        lambda: ValueError("x" * 10_000_000),
        lambda: ValueError(*range(100_000)),
        lambda: FrozenError(3),
        lambda: type("Odd", (Exception,), {"__module__": 5})("x"),
        strange_traceback,
    ],
    ids=range(8),
)
def test_hostile_exceptions_are_described_within_limits(
    make: Callable[[], BaseException],
) -> None:
    raw, text = describe(make())
    assert len(bytes(raw)) < 100_000
    assert len(text) < 100_000
    assert isinstance(rebuild(raw, "1", text), TaskFailed)


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"5", b'{"exc_type":1}', b'"\xff"', b"[" * 100_000],
    ids=lambda raw: repr(raw[:9]),
)
@pytest.mark.parametrize("status", [TaskStatus.FAILURE, TaskStatus.REVOKED])
def test_an_error_that_no_worker_wrote_is_still_a_failure(raw: bytes, status: TaskStatus) -> None:
    error = to_exception(Outcome(task_id="1", status=status, result=Raw(raw)))
    assert isinstance(error, TaskFailed | TaskRevoked)


def test_a_revoked_task_says_why() -> None:
    error = to_exception(
        Outcome(
            task_id="1", status=TaskStatus.REVOKED, result=encode_error("TaskRevoked", "expired")
        )
    )
    assert isinstance(error, TaskRevoked)
    assert str(error) == "1 was revoked: expired"


# --- the traceback ------------------------------------------------------------------------------


def test_the_remote_traceback_is_shown_with_the_failure() -> None:
    shown = "".join(traceback.format_exception(travel(ZeroDivisionError("x"))))
    assert "In the worker:" in shown
    assert "in raised" in shown


def test_causes_are_part_of_the_traceback() -> None:
    error = ValueError("outer")
    error.__cause__ = KeyError("inner")
    _, text = describe(error)
    assert "KeyError: 'inner'" in text
    assert "direct cause" in text


def test_the_workers_own_frames_are_left_out() -> None:
    namespace: dict[str, Any] = {"__name__": "aiotaskq.worker.executor"}
    exec("def run(fn): fn()", namespace)

    def fail() -> None:
        raise ValueError("x")

    def call() -> None:
        namespace["run"](fail)

    error = below(call)
    assert error.__traceback__ is not None
    _, text = describe(error.with_traceback(error.__traceback__.tb_next))
    assert "in fail" in text
    assert "in run" not in text
