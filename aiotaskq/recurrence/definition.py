"""What users write to have a task run by the clock."""

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
    """When a task runs, with what, and what becomes of runs that come late or overlap.

    Example:
        ::

            @app.task(schedule=Schedule(crontab(hour=9, minute=0), timezone="Europe/Oslo"))
            async def remind() -> None: ...

    Args:
        when: A `crontab`, `every` or `at`; seconds or a timedelta as for `every`; text with a
            crontab expression; a datetime, which is one run.
        timezone: By whose clock a crontab runs, and naive times are taken; by default the
            application's `timezone`.
        jitter: Each run comes up to so many seconds after it is due, evenly spread, so that not
            everything starts at the full minute.
        start: The first moment at which a run may be due; the grid of `every` begins there.
        end: The last such moment.
        overlap: ``"skip"`` leaves a run out while the task of the one before has not ended. It
            needs the results of the task.
        misfire: What becomes of runs that no scheduler sent within `grace` seconds: ``"once"``
            sends the latest alone, however many there were; ``"skip"`` none, ``"all"`` each.
        grace: How late a run may be sent, in seconds, and count as on time.
        args: Of the task, as JSON knows them; the worker converts them as it does for any call.
        kwargs: Likewise.
        options: Of its calls, as of `Task.with_options`, but for `eta`, `task_id` and `connection`.

    Raises:
        ConfigError: One of them is wrong.
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
        grace: Any = self.grace  # whatever it was given, as below
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
        """Return when it runs, given the application's time zone."""
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


def read_entries(given: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the schedules of a `beat_schedule`, as Celery projects have it, by their ids.

    Raises:
        ConfigError: One is wrong; its id is named.
    """
    entries: dict[str, Entry] = {}
    for name, fields in given.items():
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
            f"there is no {name!r} in a schedule; there are {', '.join((*_OF_ENTRY, *_OURS))}"
        )
    for name in ("task", "schedule"):
        if fields.get(name) is None:
            raise ConfigError(f"it has no {name!r}")
    _check_sort("task", fields["task"], str, "the name of a task")
    if fields.get("relative", True) is not True:
        raise ConfigError(
            "relative is False, and intervals lie on a grid here, so that a restart does not move"
            " them; leave it out"
        )
    if isinstance(fields["schedule"], Schedule):
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
        from zoneinfo import ZoneInfo  # only who needs one pays for it

        moment = moment.replace(tzinfo=UTC if zone == "UTC" else ZoneInfo(zone))
    return moment.timestamp()
