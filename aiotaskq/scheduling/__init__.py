"""Schedules in a store, and the scheduler that sends their runs."""
