"""PostgreSQL: a broker whose tasks are rows, and results that anybody can read with psql."""

from __future__ import annotations

from aiotaskq.drivers.postgres.broker import PostgresBroker
from aiotaskq.drivers.postgres.results import PostgresBackend

__all__ = ["PostgresBackend", "PostgresBroker"]
