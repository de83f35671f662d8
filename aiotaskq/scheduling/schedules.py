"""`Schedules`: the schedules of an application, added, changed, listed and removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from aiotaskq.contract.records import StoredSchedule
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.errors import ConfigError, EncodeError
from aiotaskq.recurrence import Entry, Misfire, Overlap, Schedule, Timing, every
from aiotaskq.scheduling.record import (
    ScheduleDefinition,
    ScheduleRecord,
    ScheduleState,
    change_record,
    define,
    drop_record,
    read,
    renewed,
)
from aiotaskq.tasks.application import Application
from aiotaskq.tasks.call import Call
from aiotaskq.tasks.handle import TaskHandle
from aiotaskq.tasks.option_table import check_name
from aiotaskq.tasks.task import Task


class ScheduleInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule and its progress.

    Attributes:
        id: The id of the schedule.
        task: The name of the task that it sends.
        when: The times of its runs, in words.
        next_at: The time of the next run, in UTC; None while it is paused, or after the last run.
        last_at: The time at which the last run was sent.
        last_id: The id of the task of the last run.
        runs: The number of runs that were sent.
        skipped: The number of runs that were left out: too late, or the one before had not ended.
        paused: Whether it is paused.
        in_code: Whether the code of the application has it; a deploy may change or remove it.
        args: The positional arguments of its calls.
        kwargs: The keyword arguments of its calls.
        options: The options of its calls.
        overlap: What happens to a run while the one before has not ended; see `Schedule`.
        misfire: What happens to late runs; see `Schedule`.
        grace: Seconds by which a run may be late; see `Schedule`.
        jitter: Seconds by which a run may come later than it is due.
        start: The first time at which a run may be due; None: there is no bound.
        end: The last such time; None: there is no bound.
    """

    id: str
    task: str
    when: str
    next_at: datetime | None
    last_at: datetime | None
    last_id: str | None
    runs: int
    skipped: int
    paused: bool
    in_code: bool
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]
    overlap: Overlap
    misfire: Misfire
    grace: float
    jitter: float
    start: datetime | None
    end: datetime | None


class Schedules:
    """The schedules of an application, as `TaskQueue.schedules`.

    They are kept in the broker's store, and any number of schedulers send their runs.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def add(
        self,
        schedule_id: str,
        task: Task[Any, Any] | Call[Any] | str,
        schedule: Schedule | Any,
        *,
        replace: bool = False,
    ) -> ScheduleInfo:
        """Add a schedule; schedulers notice it within a second.

        Example:
            ::

                await app.schedules.add("nightly", report.s("all"), crontab(hour=3, minute=0))

        Args:
            schedule_id: An id of your own.
            task: A task, ``task.s(...)`` with its arguments and options, or the name of a task.
            schedule: A `Schedule`, or the `when` of one.
            replace: Whether a schedule of this id may exist already: then it gets the new
                definition and keeps its progress.

        Raises:
            ConfigError: Something in it is wrong, or the id is taken.
            BrokerUnavailable: The broker cannot be reached.
            Unsupported: It keeps no schedules.
        """
        check_name("a schedule's id", schedule_id)
        given = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
        definition = define(self._app, task, given)
        declared = schedule_id in self._app.declared_schedules()
        store = await self._store()
        now = (await store.due(1)).now

        def change(known: ScheduleRecord | None) -> ScheduleRecord:
            if declared or (known is not None and known.definition.owner):
                raise ConfigError(
                    f"the schedule {schedule_id!r} stands in the code: change it there, or choose"
                    " another id"
                )
            if known is not None and not replace:
                raise ConfigError(
                    f"there is a schedule {schedule_id!r} already; choose another id, remove it,"
                    " or say replace=True"
                )
            record = renewed(known, definition, now)
            if record.state.due is None:
                raise ConfigError(
                    f"the schedule {schedule_id!r} would never run: {definition.timing.describe()}"
                    " has no run after now, or none before its end"
                )
            return record

        record = await change_record(store, schedule_id, change, replace_unreadable=replace)
        assert record is not None  # it was just made
        return _info(schedule_id, record)

    async def remove(self, schedule_id: str) -> bool:
        """Delete a schedule; False if there was none.

        Runs that were sent stay sent. A schedule of the application's code comes back with the next
        start of a scheduler: take it out of the code, or `pause` it.
        """
        return await drop_record(await self._store(), schedule_id)

    async def pause(self, schedule_id: str) -> ScheduleInfo:
        """Send no runs of a schedule until it is resumed; a deploy does not change that.

        Raises:
            ConfigError: There is no such schedule.
        """
        return await self._alter(
            schedule_id, lambda record: replace(record, state=replace(record.state, paused=True))
        )

    async def resume(self, schedule_id: str) -> ScheduleInfo:
        """Send the runs of a schedule again from now on; runs of the pause stay left out.

        Raises:
            ConfigError: There is no such schedule.
        """
        now = (await (await self._store()).due(1)).now

        def change(record: ScheduleRecord) -> ScheduleRecord:
            if not record.state.paused:
                return record
            due = record.definition.timing.after(now)
            return replace(record, state=replace(record.state, paused=False, due=due))

        return await self._alter(schedule_id, change)

    async def run_now(self, schedule_id: str) -> TaskHandle[Any]:
        """Send the call of a schedule now, once, paused or not; its own runs are not affected.

        Raises:
            ConfigError: There is no such schedule.
        """
        found = await (await self._store()).load([schedule_id])
        if not found:
            raise await self._unknown(schedule_id)
        call = read(found[0]).definition.call({})
        (task_id,) = await self._app.publish_calls([call])
        return TaskHandle(task_id, self._app, call.name)

    async def list(self) -> list[ScheduleInfo]:
        """Return all schedules, in the order of their ids.

        One that cannot be read has an empty `task`, and `when` tells the reason.
        """
        return [_info_of(stored) for stored in await (await self._store()).load()]

    async def get(self, schedule_id: str) -> ScheduleInfo | None:
        """Return a schedule; None if there is none of this id."""
        found = await (await self._store()).load([schedule_id])
        return _info_of(found[0]) if found else None

    async def _store(self) -> ScheduleStore:
        return await self._app.schedule_store()

    async def _alter(
        self, schedule_id: str, change: Callable[[ScheduleRecord], ScheduleRecord]
    ) -> ScheduleInfo:
        record = await change_record(
            await self._store(), schedule_id, lambda known: known and change(known)
        )
        if record is None:
            raise await self._unknown(schedule_id)
        return _info(schedule_id, record)

    async def _unknown(self, schedule_id: str) -> ConfigError:
        there = ", ".join(repr(one.id) for one in await (await self._store()).load())
        return ConfigError(f"there is no schedule {schedule_id!r}; there are: {there or 'none'}")


async def synchronize(
    store: ScheduleStore, app: Application, declared: Mapping[str, Entry]
) -> tuple[list[str], list[str]]:
    """Bring the stored schedules in line with the code of an application.

    New schedules are added, changed ones are changed and keep their progress, and those that the
    code no longer has are removed. Schedules that were made at run time are left alone.

    Returns:
        The ids that were put, and those that were removed.

    Raises:
        ConfigError: One is wrong, or its id is taken by one that was made at run time.
    """
    wanted = define_all(app, declared)
    now = (await store.due(1)).now
    put, removed = [], []
    for name, definition in wanted.items():
        if await _declare(store, name, definition, now):
            put.append(name)
    for stored in await store.load():
        gone = stored.id not in wanted and _owner(stored) == app.name
        if gone and await drop_record(store, stored.id):
            removed.append(stored.id)
    return put, removed


def define_all(app: Application, declared: Mapping[str, Entry]) -> dict[str, ScheduleDefinition]:
    """Return the definitions of the schedules of the code.

    Raises:
        ConfigError: One is wrong; its id is named.
    """
    return {
        name: replace(_define_entry(app, name, entry), owner=app.name)
        for name, entry in declared.items()
    }


async def _declare(
    store: ScheduleStore, name: str, definition: ScheduleDefinition, now: float
) -> bool:
    """Store a definition; return whether it is new or changed."""
    changed = False

    def change(known: ScheduleRecord | None) -> ScheduleRecord:
        nonlocal changed
        changed = known is None or known.definition != definition
        if known is not None and known.definition.owner != definition.owner:
            owner = known.definition.owner
            raise ConfigError(
                f"the schedule {name!r} of the code has the id of one"
                f" {f'of the application {owner!r}' if owner else 'that was made at run time'}:"
                " rename one of them, or remove that one (aiotaskq schedule remove)"
            )
        return renewed(known, definition, now) if changed else cast("ScheduleRecord", known)

    await change_record(store, name, change, replace_unreadable=True)  # the code has a right one
    return changed


def _define_entry(app: Application, name: str, entry: Entry) -> ScheduleDefinition:
    try:
        check_name("a schedule's id", name)
        return define(app, entry.task, entry.schedule)
    except (ConfigError, EncodeError, TypeError) as error:
        raise ConfigError(f"the schedule {name!r}: {error}") from error


def _owner(stored: StoredSchedule) -> str:
    try:
        return read(stored).definition.owner
    except ConfigError:
        return ""  # the scheduler tells of it when it is due


def _info_of(stored: StoredSchedule) -> ScheduleInfo:
    try:
        return _info(stored.id, read(stored))
    except Exception as error:  # whatever the store holds, the others are to be listed
        why = str(error)
        if not isinstance(error, ConfigError):
            why = f"the stored schedule {stored.id!r} cannot be shown: {why}"
        unread = ScheduleRecord(
            definition=ScheduleDefinition(task="", timing=Timing(when=every(1))),
            state=ScheduleState(paused=True),
        )
        return replace(_info(stored.id, unread), when=why)


def _info(schedule_id: str, record: ScheduleRecord) -> ScheduleInfo:
    definition, state = record.definition, record.state
    args, kwargs = definition.arguments()
    return ScheduleInfo(
        id=schedule_id,
        task=definition.task,
        when=definition.timing.describe(),
        next_at=_time(record.stored(schedule_id).due_at),
        last_at=_time(state.last_at),
        last_id=state.last_id,
        runs=state.runs,
        skipped=state.skipped,
        paused=state.paused,
        in_code=bool(definition.owner),
        args=args,
        kwargs=kwargs,
        options=definition.options,
        overlap=definition.overlap,
        misfire=definition.misfire,
        grace=definition.grace,
        jitter=definition.timing.jitter,
        start=_time(definition.timing.start),
        end=_time(definition.timing.end),
    )


def _time(moment: float | None) -> datetime | None:
    return None if moment is None else datetime.fromtimestamp(moment, UTC)
