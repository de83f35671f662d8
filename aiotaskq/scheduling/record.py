"""The record of a schedule in a store: its definition, and its progress.

Every change is a compare-and-swap on the revision: it names the revision that it has read, and
reads again if another change was faster. There are no locks, so a process that dies in the middle
of a change holds up nobody.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from aiotaskq.contract.message import RetryPolicy
from aiotaskq.contract.records import StoredSchedule
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.encoding.codec import Codec, to_builtin
from aiotaskq.encoding.forms import UNKNOWN_FORM
from aiotaskq.encoding.tags import resolve
from aiotaskq.errors import ConfigError, EncodeError
from aiotaskq.readable import get_logger
from aiotaskq.recurrence import GRACE, Misfire, Overlap, Schedule, Timing
from aiotaskq.retry import Retry, for_call
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.call import Call
from aiotaskq.tasks.option_table import check_name
from aiotaskq.tasks.options import CallOptions, check_args, check_call_options
from aiotaskq.tasks.task import Task

logger = get_logger("aiotaskq.scheduler")

_ATTEMPTS = 100  # attempts of a change while other changes are faster each time


class ScheduleDefinition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The calls that a schedule sends, and their times, as stored."""

    task: str
    timing: Timing
    args: list[Any] = []  # with tagged forms, as the arguments of a message
    kwargs: dict[str, Any] = {}
    options: dict[str, Any] = {}  # options of the calls; a retry as a `RetryPolicy`
    overlap: Overlap = "allow"
    misfire: Misfire = "once"
    grace: float = GRACE  # seconds
    owner: str = ""  # the application whose code has it; empty: it was made at run time

    def call(self, extra: CallOptions) -> Call[Any]:
        """Return the call of one run."""
        options = dict(self.options)
        if "retry" in options:
            options["retry"] = for_call(msgspec.convert(options["retry"], RetryPolicy), Retry())
        args, kwargs = self.arguments()
        return Call(self.task, tuple(args), kwargs, cast("CallOptions", {**options, **extra}))

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of its calls as they were given.

        Raises:
            ValueError: They were not written here.
        """
        return resolve(self.args)[0], resolve(self.kwargs)[0]


class ScheduleState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress of a schedule, as stored."""

    due: float | None = None  # Unix time of the next run, before jitter; None: there is none
    paused: bool = False
    last_due: float | None = None  # the due time of the last run that was sent
    last_at: float | None = None  # the time at which it was sent, by the store's clock
    last_id: str | None = None  # the id of its task
    runs: int = 0  # runs that were sent
    skipped: int = 0  # runs that were left out: too late, or the one before had not ended


class ScheduleRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule, as stored."""

    definition: ScheduleDefinition
    state: ScheduleState

    def stored(self, schedule_id: str) -> StoredSchedule:
        """Return the schedule for the store, as a new revision."""
        due = None if self.state.paused else self.state.due
        coming = None if due is None else self.definition.timing.delayed(due, schedule_id)
        return StoredSchedule(
            id=schedule_id, body=_encode(self), due_at=coming, revision=uuid.uuid4().hex
        )


class UnreadableSchedule(ConfigError):
    """A stored record is no schedule of this package."""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ScheduleRecord).decode


def read(stored: StoredSchedule) -> ScheduleRecord:
    """Return the record of a stored schedule.

    Raises:
        UnreadableSchedule: It cannot be read.
    """
    try:
        record = _decode(stored.body)
        record.definition.arguments()
        for moment in (record.state.due, record.state.last_due, record.state.last_at):
            if moment is not None:
                datetime.fromtimestamp(moment, UTC)  # beyond the calendar it raises
        if not math.isfinite(record.definition.grace):
            raise ValueError("grace is not finite")
    except (
        msgspec.MsgspecError,
        ConfigError,
        ArithmeticError,
        ValueError,
        OSError,
        RecursionError,
    ) as error:
        raise UnreadableSchedule(
            f"the stored schedule {stored.id!r} cannot be read: {error}; remove it and add it again"
        ) from error
    return record


def parked(stored: StoredSchedule) -> StoredSchedule:
    """Return a schedule that is not due any more and stays as it is, as a new revision."""
    return StoredSchedule(id=stored.id, body=stored.body, due_at=None, revision=uuid.uuid4().hex)


def define(
    app: Application, task: Task[Any, Any] | Call[Any] | str, schedule: Schedule
) -> ScheduleDefinition:
    """Return the definition of a schedule.

    Raises:
        ConfigError: Something in it is wrong.
        TypeError: The arguments do not fit the task.
    """
    given: Any = task  # of any type, as a user gave it
    if isinstance(given, Call):
        if schedule.args or schedule.kwargs or schedule.options:
            raise ConfigError(
                "the arguments and options stand in task.s(...) and in the Schedule: give them once"
            )
        name, args, kwargs, options = given.name, given.args, given.kwargs, given.options
    else:
        name = given.name if isinstance(given, Task) else given
        args, kwargs = check_args(schedule.args), dict(schedule.kwargs)
        options = check_call_options(cast("CallOptions", dict(schedule.options)))
    check_name("a task's name", name)
    known = app.tasks.get(name)
    if known is not None:
        known.arguments.check(args, kwargs)
        _codec.pack(args, kwargs, known.arguments)  # refuses what would not arrive as it is
    for option in ("eta", "task_id", "connection"):
        if option in options:
            raise ConfigError(f"{option} makes no sense for a schedule: each run is another task")
    if schedule.overlap == "skip":
        _check_results(app, name)
    return ScheduleDefinition(
        task=name,
        timing=schedule.timing(app.conf.timezone),
        args=[_argument(value) for value in args],
        kwargs={name: _argument(value) for name, value in kwargs.items()},
        options=_plain_options(options),
        overlap=schedule.overlap,
        misfire=schedule.misfire,
        grace=schedule.grace,
    )


def renewed(
    known: ScheduleRecord | None, definition: ScheduleDefinition, now: float
) -> ScheduleRecord:
    """Return the record with a new definition and the old progress."""
    state = ScheduleState() if known is None else known.state
    due = definition.timing.after(now if state.last_due is None else max(now, state.last_due))
    return ScheduleRecord(definition=definition, state=replace(state, due=due))


async def change_record(
    store: ScheduleStore,
    schedule_id: str,
    change: Callable[[ScheduleRecord | None], ScheduleRecord | None],
    *,
    replace_unreadable: bool = False,
) -> ScheduleRecord | None:
    """Change a schedule; `change` gets the present record, anew while other changes are faster.

    Args:
        store: The store.
        schedule_id: The id of the schedule.
        change: Returns the record in place of the present one; None: there is nothing to change.
        replace_unreadable: Whether one that cannot be read counts as none.
    """
    for _ in range(_ATTEMPTS):
        found = await store.load([schedule_id])
        try:
            known = read(found[0]) if found else None
        except UnreadableSchedule as error:
            if not replace_unreadable:
                raise
            logger.error("%s: it is replaced", error)
            known = None
        record = change(known)
        if record is None or record == known:
            return record
        seen = found[0].revision if found else None
        if await store.compare_and_swap(schedule_id, seen, record.stored(schedule_id)):
            return record
    raise _contended(schedule_id)


async def drop_record(store: ScheduleStore, schedule_id: str) -> bool:
    """Remove a schedule, however often it is changed meanwhile; False if there is none."""
    for _ in range(_ATTEMPTS):
        found = await store.load([schedule_id])
        if not found:
            return False
        if await store.compare_and_swap(schedule_id, found[0].revision, None):
            return True
    raise _contended(schedule_id)


def _contended(schedule_id: str) -> ConfigError:
    return ConfigError(
        f"the schedule {schedule_id!r} was changed by others {_ATTEMPTS} times meanwhile: try again"
    )


def _check_results(app: Application, name: str) -> None:
    if app.effective_options(name).ignore_result or not app.keeps_results:
        raise ConfigError(
            f'overlap="skip" has to see whether the last run has ended, and {name} keeps no'
            " results: give it some, or leave overlap out"
        )


_codec = Codec()


def _argument(value: Any) -> Any:
    """Return an argument as JSON data; its tags keep the types that JSON has not."""
    try:
        return msgspec.json.decode(UNKNOWN_FORM.write(value, json=True))
    except EncodeError as error:
        raise EncodeError(
            f"the arguments of a schedule rest as JSON, and one has no form in it: {error}"
        ) from error


def _plain(what: str, value: Any) -> Any:
    try:
        return msgspec.to_builtins(value, enc_hook=to_builtin, str_keys=True)
    except Exception as error:  # the methods of a user's value may raise anything
        raise EncodeError(
            f"{what} of a schedule rest as JSON, and these have no form in it: {error}"
        ) from error


def _plain_options(options: CallOptions) -> dict[str, Any]:
    plain: dict[str, Any] = dict(options)
    expires = plain.get("expires")
    if isinstance(expires, datetime):
        raise ConfigError(
            "expires is a point in time; of a schedule it has to be seconds, or a timedelta, from"
            " each run on"
        )
    if expires is not None and not isinstance(expires, int | float):
        plain["expires"] = expires.total_seconds()
    if "retry" in plain:
        plain["retry"] = plain["retry"].to_policy()
    return cast("dict[str, Any]", _plain("options", plain))
