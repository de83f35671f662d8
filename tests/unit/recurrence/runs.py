"""Times and runs of schedules as text, and an object that is no schedule."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from aiotaskq.recurrence import Timing, When


class Odd:
    def __repr__(self) -> str:
        return "odd"


ODD = Odd()


def unix(text: str) -> float:
    """A time in ISO 8601, in UTC where it has no offset."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def runs(when: When, begin: str, end: str, zone: str = "UTC", **bounds: float | None) -> list[str]:
    """The times after `begin` up to `end`, as the zone's clock shows them, with its offset."""
    timing = Timing(when=when, timezone=zone, **bounds)  # type: ignore[arg-type]  # start and end
    place = ZoneInfo(zone)
    found = timing.between(unix(begin), unix(end))
    return [f"{datetime.fromtimestamp(due, place):%m-%d %H:%M:%S%z}" for due in found]
