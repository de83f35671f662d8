"""What a schedule is and when it runs. Pure: nothing here has a clock or does I/O."""

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
