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
    """Return the Unix time of a text in ISO 8601, which is in UTC if it has no offset."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def runs(when: When, begin: str, end: str, zone: str = "UTC", **bounds: float | None) -> list[str]:
    """Return the runs after `begin` up to `end`, by the clock of the zone, with its offset."""
    timing = Timing(when=when, timezone=zone, **bounds)  # type: ignore[arg-type]  # start and end
    place = ZoneInfo(zone)
    found = timing.between(unix(begin), unix(end))
    return [f"{datetime.fromtimestamp(due, place):%m-%d %H:%M:%S%z}" for due in found]
