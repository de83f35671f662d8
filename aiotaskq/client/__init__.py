"""Sending tasks, waiting for their results, and the dead letters."""
