"""Schedules in the broker's store, and the scheduler that sends their runs.

============  ============================================================
`record`      a schedule as it is stored: its definition and its progress
`schedules`   `app.schedules`: add, pause, remove, list
`scheduler`   sends the runs that are due
============  ============================================================

The arithmetic of times is in `aiotaskq.recurrence`, which knows no store and no clock.
"""
