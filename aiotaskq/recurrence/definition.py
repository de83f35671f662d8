"""`Schedule`, the definition of a schedule by a user, and the entries of `beat_schedule`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, get_args

import msgspec
from msgspec import structs

from aiotaskq.errors import ConfigError
from aiotaskq.recurrence.plan import Misfire, Overlap
from aiotaskq.recurrence.timing import Timing, When, as_when

GRACE = 60.0  # seconds


class Schedule(msgspec.Struct, frozen=True):
    """The times of a task's runs, its arguments, and the rules for late and overlapping runs.

    Example:
        ::

            @app.task(schedule=Schedule(crontab(hour=9, minute=0), timezone="Europe/Oslo"))
            async def remind() -> None: ...

    Args:
        when: A `crontab`, `every` or `at`; seconds or a timedelta, as for `every`; a text with a
            crontab expression; or a datetime, for one run.
        timezone: The time zone of a crontab and of naive times; by default the application's
            `timezone`.
        jitter: The longest delay of a run, in seconds. Each run is delayed by a different part of
            it, so that not all schedules run at the full minute.
        start: The first moment at which a run may be due. The grid of `every` begins there.
        end: The last moment at which a run may be due.
        overlap: ``"allow"``, or ``"skip"``: a run is left out if the task of the run before has not
            ended. That needs the results of the task.
        misfire: The rule for runs that no scheduler sent within `grace` seconds: ``"once"`` sends
            only the latest of them, ``"skip"`` none, ``"all"`` every one.
        grace: Seconds by which a run may be late and still count as on time.
        args: The arguments of the task, as JSON values. The worker converts them as for any call.
        kwargs: The keyword arguments of the task, likewise.
        options: The options of its calls, as for `Task.with_options`, except `eta`, `task_id` and
            `connection`.

    Raises:
        ConfigError: One of the arguments is wrong.
    """

    when: Any
    timezone: str | None = None
    jitter: float = 0.0
    start: datetime | None = None
    end: datetime | None = None
    overlap: Overlap = "allow"
    misfire: Misfire = "once"
    grace: float = GRACE
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}

    def __post_init__(self) -> None:
        structs.force_setattr(self, "when", as_when(self.when))
        for name, allowed in (("overlap", get_args(Overlap)), ("misfire", get_args(Misfire))):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it may be {', '.join(map(repr, allowed))}"
                )
        grace: Any = self.grace  # of any type, whatever the annotation says
        if (
            isinstance(grace, bool)
            or not isinstance(grace, int | float)
            or not 0 <= grace < math.inf
        ):
            raise ConfigError(f"grace is {grace!r}; it must be seconds, 0 or more")
        _check_sort("args", self.args, list | tuple, "a list or a tuple")
        for name in ("kwargs", "options"):
            _check_sort(name, getattr(self, name), Mapping, "a mapping")
        for name in ("start", "end"):
            if getattr(self, name) is not None:
                _check_sort(name, getattr(self, name), datetime, "a datetime")
        self.timing("UTC")

    def timing(self, timezone: str) -> Timing:
        """Return the times of its runs, given the application's time zone."""
        zone = self.timezone or timezone
        when: When = self.when
        bare = Timing(when=when, timezone=zone, jitter=self.jitter)
        return structs.replace(bare, start=_moment(self.start, zone), end=_moment(self.end, zone))


class Entry(msgspec.Struct, frozen=True):
    """A schedule and the name of the task that it sends."""

    task: str
    schedule: Schedule


_OF_ENTRY = ("task", "schedule", "args", "kwargs", "options", "relative")
_OURS = ("timezone", "jitter", "start", "end", "overlap", "misfire", "grace")


def read_entries(given: Mapping[Any, Any]) -> dict[str, Entry]:
    """Return the schedules of a `beat_schedule`, as in Celery, by their ids.

    Raises:
        ConfigError: One of them is wrong; the error has its id.
    """
    entries: dict[str, Entry] = {}
    for name, fields in given.items():
        if not isinstance(name, str):
            raise ConfigError(f"{name!r} is no id of a schedule; it must be a text")
        try:
            entries[name] = _read_entry(fields)
        except ConfigError as error:
            raise ConfigError(f"{name!r}: {error}") from None
    return entries


def _read_entry(fields: Any) -> Entry:
    if isinstance(fields, Entry):
        return fields
    if not isinstance(fields, Mapping):
        raise ConfigError(f'{fields!r} is no mapping with "task" and "schedule"')
    for name in fields.keys() - {*_OF_ENTRY, *_OURS}:
        raise ConfigError(
            f"there is no {name!r} in a schedule; it may have {', '.join((*_OF_ENTRY, *_OURS))}"
        )
    for name in ("task", "schedule"):
        if fields.get(name) is None:
            raise ConfigError(f"it has no {name!r}")
    _check_sort("task", fields["task"], str, "the name of a task")
    if fields.get("relative", True) is not True:
        raise ConfigError(
            "relative is False, but intervals lie on a grid in aiotaskq, so that a restart does not"
            " move them; leave it out"
        )
    if isinstance(fields["schedule"], Schedule):
        for name in fields.keys() - {"task", "schedule", "relative"}:
            raise ConfigError(
                f"{name!r} stands beside a Schedule(...), which would not see it: write it in there"
            )
        return Entry(fields["task"], fields["schedule"])
    given = {name: fields[name] for name in _OURS if name in fields}
    for name, empty in (("args", ()), ("kwargs", {}), ("options", {})):
        given[name] = fields.get(name) or empty
    return Entry(fields["task"], Schedule(fields["schedule"], **given))


def _check_sort(name: str, value: Any, sort: Any, wanted: str) -> None:
    if not isinstance(value, sort):
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}")


def _moment(moment: datetime | None, zone: str) -> float | None:
    if moment is None:
        return None
    if moment.tzinfo is None:
        from zoneinfo import ZoneInfo  # needed only for naive times

        moment = moment.replace(tzinfo=UTC if zone == "UTC" else ZoneInfo(zone))
    return moment.timestamp()
