"""Schedules as values: their definition and the times of their runs. No clock and no I/O."""

from aiotaskq.recurrence.cron import Crontab, crontab
from aiotaskq.recurrence.definition import GRACE, Entry, Schedule
from aiotaskq.recurrence.plan import Misfire, Overlap, Plan, plan
from aiotaskq.recurrence.timing import At, Every, Timing, When, as_when, at, every

__all__ = [
    "GRACE",
    "At",
    "Crontab",
    "Entry",
    "Every",
    "Misfire",
    "Overlap",
    "Plan",
    "Schedule",
    "Timing",
    "When",
    "as_when",
    "at",
    "crontab",
    "every",
    "plan",
]
