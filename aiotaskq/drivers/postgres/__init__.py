"""The PostgreSQL driver: messages and results as rows that can be read with psql."""

from __future__ import annotations

from aiotaskq.drivers.postgres.broker import PostgresBroker
from aiotaskq.drivers.postgres.results import PostgresBackend

__all__ = ["PostgresBackend", "PostgresBroker"]
