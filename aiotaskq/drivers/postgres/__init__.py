"""PostgreSQL: results, as rows that anybody can read with psql."""

from __future__ import annotations

from aiotaskq.drivers.postgres.results import PostgresBackend

__all__ = ["PostgresBackend"]
