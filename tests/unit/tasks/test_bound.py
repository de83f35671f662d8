"""Tasks with ``bind=True``: their first argument, ``self.request`` and ``self.retry``."""

from __future__ import annotations

import contextvars
import inspect
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from aiotaskq import (
    ConfigError,
    MaxRetriesExceededError,
    Retry,
    RetryLater,
    State,
    Task,
    TaskContext,
    TaskQueue,
)
from aiotaskq.context import enter
from aiotaskq.contract.message import Attempt, Message
from aiotaskq.encoding.codec import Codec

if TYPE_CHECKING:
    from aiotaskq import Task as OnlyCheckersKnowIt

T = TypeVar("T")


@pytest.fixture
def app() -> TaskQueue:
    return TaskQueue("t", broker="memory://")


async def double(self: Task[..., Any], x: int) -> tuple[Any, int]:
    return self, x * 2


def during(task: Task[..., Any], call: Callable[[], T], **facts: Any) -> T:
    """Call something as if a worker ran the task."""

    def run() -> T:
        message = Message(**{"id": "i", "task": task.name, **facts})
        enter(TaskContext(message, (1,), {"y": 2}, state=State(), worker="w"))
        return call()

    return contextvars.copy_context().run(run)


# --- the first argument -------------------------------------------------------------------------


async def test_the_task_is_the_first_argument_and_callers_leave_it_out(app: TaskQueue) -> None:
    task = app.task(bind=True)(double)
    assert await task(4) == (task, 8)
    assert await task.call(4) == (task, 8)
    assert task.fn is double
    assert list(inspect.signature(task).parameters) == ["x"]
    assert task.s(4).args == (4,)


def test_a_task_that_is_not_bound_is_called_as_it_is(app: TaskQueue) -> None:
    task = app.task(double)
    assert task.call is double


def test_the_rest_of_the_signature_is_checked(app: TaskQueue) -> None:
    task: Task[..., Any] = app.task(bind=True)(double)
    for args, kwargs in [((), {}), ((1, 2), {}), ((), {"self": 1, "x": 2}), ((task, 1), {})]:
        with pytest.raises(TypeError, match=r"double\(x: "):
            task.s(*args, **kwargs)


def read(task: Task[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return arguments as a worker reads them."""
    codec = Codec()
    packed, named, _ = codec.pack(args, kwargs)
    body = codec.encode_message(Message(id="i", task=task.name, args=packed, kwargs=named))
    return task.arguments.load(codec.decode_message(body), body)


def test_the_rest_of_the_arguments_is_converted(app: TaskQueue) -> None:
    @app.task(bind=True)
    def when(self: Task[..., Any], at: datetime, *, also: datetime) -> None: ...

    moment = datetime(2030, 1, 1, tzinfo=UTC)
    assert read(when, moment, also=moment) == ((moment,), {"also": moment})


def test_the_annotation_of_the_task_itself_is_never_needed(app: TaskQueue) -> None:
    @app.task(bind=True)
    def typed(self: OnlyCheckersKnowIt[..., Any], at: datetime) -> datetime:
        return at

    typed.arguments.prepare()
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    assert read(typed, moment.isoformat()) == ((moment,), {})
    assert typed.arguments.read_result(b'"2030-01-01T00:00:00Z"', True) == moment


def test_a_bound_function_needs_a_parameter(app: TaskQueue) -> None:
    def nothing() -> None: ...

    with pytest.raises(ConfigError, match=r"nothing .* def nothing\(self, \.\.\.\)"):
        app.task(bind=True)(nothing)  # type: ignore[arg-type]  # that is the point


def test_the_task_may_come_in_a_row_of_arguments(app: TaskQueue) -> None:
    @app.task(bind=True)
    def row(*args: Any) -> tuple[Any, ...]:
        return args

    assert row(1, 2) == (row, 1, 2)
    assert read(row, 1, 2) == ((1, 2), {})


# --- self.request -------------------------------------------------------------------------------


def test_outside_of_a_run_the_request_says_so(app: TaskQueue) -> None:
    request = app.task(bind=True)(double).request
    assert request.called_directly
    assert (request.id, request.task, request.args, request.retries) == (None, None, None, 0)


def test_the_request_tells_of_the_run_in_celerys_words(app: TaskQueue) -> None:
    task = app.task(bind=True, time_limit=9, soft_time_limit=7)(double)
    request = during(
        task,
        lambda: task.request,
        attempt=3,
        queue="q",
        priority=4,
        expires_at=0.0,
        headers={"a": "b"},
    )
    assert not request.called_directly
    assert request.id == request.correlation_id == "i"
    assert request.task == request.name == task.name
    assert request.retries == 2
    assert (request.args, request.kwargs) == ((1,), {"y": 2})
    assert request.delivery_info == {"routing_key": "q", "priority": 4}
    assert request.expires == datetime(1970, 1, 1, tzinfo=UTC)
    assert request.headers == {"a": "b"}
    assert request.hostname == "w"
    assert request.timelimit == (9, 7)


def test_the_limits_are_the_calls_then_the_tasks_then_the_applications(app: TaskQueue) -> None:
    app.conf.update(task_time_limit=60, task_soft_time_limit=50)
    task = app.task(bind=True, timeout=30)(double)
    assert task.request.timelimit == (30, 50)
    asked = during(task, lambda: task.request, timeout=5.0, soft_timeout=4.0)
    assert asked.timelimit == (5, 4)

    @app.task(bind=True)
    def threaded(self: Task[..., Any]) -> None: ...

    assert threaded.request.timelimit == (60, 50)


def test_a_task_called_by_another_one_is_called_directly(app: TaskQueue) -> None:
    task = app.task(bind=True)(double)
    other = app.task(name="other", bind=True)(double)
    assert during(other, lambda: task.request).called_directly
    assert not during(other, lambda: other.request).called_directly


def test_the_context_tells_the_attempts_before(app: TaskQueue) -> None:
    earlier = Attempt(number=1, at=1.0, worker="w", error="OSError")
    context = TaskContext(
        Message(id="i", task="t", attempt=2, history=(earlier,)), (), {}, state=State(), worker="w"
    )
    assert context.history == (earlier,)


# --- self.retry ---------------------------------------------------------------------------------


def asked(task: Task[..., Any], *, attempt: int = 1, **arguments: Any) -> RetryLater:
    return during(task, lambda: task.retry(throw=False, **arguments), attempt=attempt)


def test_retry_without_options_is_as_in_celery(app: TaskQueue) -> None:
    task = app.task(bind=True)(double)
    later = asked(task)
    assert (later.delay, later.max_attempts) == (180, 4)
    assert (task.max_retries, task.default_retry_delay) == (3, 180)
    asked(task, attempt=3)
    with pytest.raises(MaxRetriesExceededError, match="has had its 4 attempts"):
        asked(task, attempt=4)


def test_retry_raises_unless_throw_is_false(app: TaskQueue) -> None:
    task = app.task(bind=True)(double)
    with pytest.raises(RetryLater):
        during(task, task.retry)


@pytest.mark.parametrize(
    ("options", "delay", "most"),
    [
        ({"max_retries": 5}, 180, 6),
        ({"max_retries": None, "default_retry_delay": 7}, 7, math.inf),
        ({"autoretry_for": (OSError,), "retry_backoff": True}, 180, 4),
        ({"retry": Retry(max_attempts=9, delay=2)}, None, 9),
    ],
    ids=repr,
)
def test_the_options_of_the_task_say_how_often_and_when(
    app: TaskQueue, options: Any, delay: float | None, most: float
) -> None:
    task = app.task(bind=True, **options)(double)
    later = asked(task)
    assert (later.delay, later.max_attempts) == (delay, most)
    assert task.max_retries == (None if most == math.inf else most - 1)


def test_options_of_the_call_precede_the_default_of_the_application(
    app: TaskQueue,
) -> None:
    app.conf.task_default_retry = Retry(max_attempts=7)
    task = app.task(bind=True)(double)
    assert (asked(task).delay, asked(task).max_attempts) == (None, 7)
    policy = Retry(max_attempts=2).to_policy()
    later = during(task, lambda: task.retry(throw=False), retry=policy)
    assert (later.delay, later.max_attempts) == (None, 2)
    with pytest.raises(MaxRetriesExceededError):
        during(task, task.retry, retry=policy, attempt=2)


def test_the_arguments_of_the_call_go_before_all(app: TaskQueue) -> None:
    task = app.task(bind=True, max_retries=1, default_retry_delay=7)(double)
    later = asked(task, attempt=3, countdown=0, max_retries=3)
    assert (later.delay, later.max_attempts) == (0, 4)
    with pytest.raises(MaxRetriesExceededError):
        asked(task, max_retries=0)


def test_a_time_becomes_seconds_from_now(app: TaskQueue) -> None:
    task = app.task(bind=True)(double)
    app.conf.timezone = "Asia/Tokyo"
    for zone in (UTC, None):
        before = time.time()
        # A naive time is in the time zone of the application.
        local = datetime.now(UTC) if zone else datetime.now(UTC).replace(tzinfo=None)
        eta = local + timedelta(hours=1 if zone else 10)
        later = asked(task, eta=eta)
        assert later.delay is not None
        assert 3599 - (time.time() - before) < later.delay <= 3600
    assert asked(task, eta=datetime(2020, 1, 1)).delay == 0
    assert asked(task, countdown=-5).delay == 0


def test_the_error_of_the_task_is_the_cause(app: TaskQueue) -> None:
    task = app.task(bind=True)(double)
    error = ValueError("why")
    later = asked(task, exc=error)
    assert later.__cause__ is error
    assert later.reason == "ValueError: why"

    def handle() -> RetryLater:
        try:
            raise error
        except ValueError:
            return task.retry(throw=False)

    assert during(task, handle).__cause__ is error


def test_when_all_are_used_up_the_error_itself_is_raised(app: TaskQueue) -> None:
    task = app.task(bind=True, max_retries=2)(double)
    handled, given = OSError("handled"), ValueError("given")
    with pytest.raises(ValueError, match="given"):
        asked(task, attempt=3, exc=given)

    def handle(exc: Exception | None) -> None:
        try:
            raise handled
        except OSError:
            raise task.retry(exc=exc) from None

    with pytest.raises(OSError, match="handled") as caught:
        during(task, lambda: handle(handled), attempt=3)
    assert caught.value is handled
    with pytest.raises(ValueError, match="given") as other:
        during(task, lambda: handle(given), attempt=3)
    assert other.value.__cause__ is handled
    with pytest.raises(task.MaxRetriesExceededError):
        during(task, lambda: handle(None), attempt=3)


def test_outside_of_a_run_there_is_nothing_to_try_again(app: TaskQueue) -> None:
    task = app.task(bind=True)(double)
    with pytest.raises(RuntimeError, match="no worker runs"):
        task.retry()
    with pytest.raises(ValueError, match="why"):
        task.retry(exc=ValueError("why"))
    other = app.task(name="other", bind=True)(double)
    with pytest.raises(RuntimeError, match="no worker runs"):
        during(other, task.retry)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"args": (1,)}, "cannot change the arguments"),
        ({"kwargs": {}}, "cannot change the arguments"),
        ({"countdown": 5, "eta": datetime(2030, 1, 1)}, "give one of them"),
    ],
)
def test_wrong_arguments_of_retry_are_refused(
    app: TaskQueue, wrong: dict[str, Any], why: str
) -> None:
    task = app.task(bind=True)(double)
    with pytest.raises(ConfigError, match=why):
        asked(task, **wrong)
