"""Migrations of the driver's tables: numbered steps, applied once each.

Theory of operation. Each file in `migrations` is one step, ``NNN_<part>.sql`` or
``NNN_<part>_<subject>.sql``, and belongs to a part: results, or broker. A program that only stores
results gets no tables of the broker. The table ``<prefix>_migrations`` lists the steps applied.

- All missing steps are applied in one transaction, under an advisory lock that ends with it. A
  crash, a lost connection or an error in any step leaves the tables as they were. So any number of
  programs may start at once, also behind a pooler: one of them applies the steps, the others wait
  for the lock and then find nothing missing.
- A program that starts looks without the lock first. If nothing is missing, that is all: most
  starts take no lock and need no right to create tables.
- Steps are never changed once released, only added. A database with a step that this release does
  not know was changed by a later release, and is refused.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

import asyncpg

from aiotaskq.drivers.postgres.connection import Connection, PostgresPool
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.errors import ConfigError


class PostgresMigration(NamedTuple):
    """One step.

    Attributes:
        number: The position of the step among all steps.
        name: The name of its file, without the ending.
        part: The part of the driver that needs it: "results" or "broker".
        template: Its statements, with ``{prefix}``.
    """

    number: int
    name: str
    part: str
    template: str


def _read(file: Traversable) -> PostgresMigration:
    name = file.name.removesuffix(".sql")
    number, part = name.split("_")[:2]
    return PostgresMigration(int(number), name, part, file.read_text(encoding="utf-8"))


# Read at import, because a migration may run on an event loop, which must not read files.
_FILES = (files("aiotaskq.drivers.postgres") / "migrations").iterdir()
MIGRATIONS = sorted(_read(file) for file in _FILES if file.name.endswith(".sql"))

# Lists the steps applied. Locks nothing: it runs before the lock, and again under it.
_APPLIED = 'SELECT number, name FROM "{prefix}_migrations" ORDER BY number'
# Makes the table of steps, under the advisory lock. Every user may read it, so that one who may not
# create tables can see that nothing is missing.
_CREATE = """\
CREATE TABLE IF NOT EXISTS "{prefix}_migrations" (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT ON "{prefix}_migrations" TO PUBLIC;
"""
# Waits until no other program migrates; an advisory lock, because the tables may not exist yet.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
# Tells whether a table exists. It reads pg_class because `to_regclass` alone may answer from before
# the lock was granted.
_EXISTS = "SELECT EXISTS (SELECT FROM pg_class WHERE oid = to_regclass($1))"
# Tells whether the results table is complete without the table of steps, which the first releases
# did not have. Locks nothing.
_RESULTS_ARE_COMPLETE = """
SELECT EXISTS (
    SELECT FROM pg_attribute
    WHERE attrelid = to_regclass($1) AND attname = 'history' AND NOT attisdropped
)
"""


class PostgresMigrations:
    """The steps that some parts of the driver need.

    Args:
        names: The names of the tables.
        parts: "results", "broker", or both.
    """

    def __init__(self, names: PostgresNames, *parts: str) -> None:
        self._names = names
        self._parts = parts
        self._wanted = [one for one in MIGRATIONS if one.part in parts]

    async def open(self, pool: PostgresPool) -> None:
        """Open the pool of a driver, with all tables in place. Idempotent.

        Raises:
            ConfigError: The server refuses the user, the password, the database or the tables.
            Unavailable: The server cannot be reached now.
        """
        await pool.open(self._prepare)

    async def migrate(self, pool: PostgresPool, *, dry_run: bool) -> list[tuple[str, str]]:
        """Apply the missing steps, all or none; the pool need not be open.

        Args:
            pool: The pool of a driver.
            dry_run: Return the missing steps without applying them.

        Returns:
            The name and the statements of each missing step.

        Raises:
            ConfigError: The server refuses it, or a later release changed the tables.
            Unavailable: The server cannot be reached now.
        """

        async def work(connection: Connection) -> list[PostgresMigration]:
            try:
                return await (self._missing(connection) if dry_run else self._apply(connection))
            except asyncpg.InsufficientPrivilegeError as error:
                raise ConfigError(
                    f"this user may not create or change the tables {self._names.prefix}_*"
                    f" ({error}): run it as a user who may, or pass the output of --sql to psql"
                ) from error

        steps = await pool.once(work)
        return [(one.name, self._script(one)) for one in steps]

    async def _prepare(self, connection: Connection) -> None:
        """Apply the missing steps, if there are any and the user may do that."""
        if not await self._missing(connection):
            return
        try:
            await self._apply(connection)
        except asyncpg.InsufficientPrivilegeError as error:
            if await self._is_complete(connection):
                return
            raise ConfigError(
                f"the tables {self._names.prefix}_* are missing or not up to date, and this user"
                f" may not change that ({error}): have a user who may create tables in the schema"
                " run `aiotaskq migrate tasks:app`, once for each release"
            ) from error

    async def _missing(self, connection: Connection) -> list[PostgresMigration]:
        """Return the steps that are not applied; refuse the tables of a later release."""
        applied = await self._applied(connection)
        self._refuse_later(applied)
        return [one for one in self._wanted if one.number not in applied]

    async def _apply(self, connection: Connection) -> list[PostgresMigration]:
        """Apply the missing steps, all or none; return them."""
        async with connection.transaction():
            # If this process is stopped in the middle, other programs need not wait for it.
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = '10s'")
            await connection.execute(_LOCK, self._names.table("migrations"))
            missing = await self._missing(connection)
            for one in missing:
                await connection.execute(self._script(one))
        return missing

    def _script(self, migration: PostgresMigration) -> str:
        """Return the statements of a step, and the statement that records it."""
        return self._names.render(
            f"{_CREATE}{migration.template}"
            'INSERT INTO "{prefix}_migrations" (number, name)'
            f" VALUES ({migration.number}, '{migration.name}');\n"
        )

    async def _applied(self, connection: Connection) -> dict[int, str]:
        if not await connection.fetchval(_EXISTS, self._names.table("migrations")):
            return {}
        rows = await connection.fetch(self._names.render(_APPLIED))
        return {row["number"]: row["name"] for row in rows}

    def _refuse_later(self, applied: dict[int, str]) -> None:
        known = {one.number for one in MIGRATIONS}
        unknown = [
            name
            for number, name in applied.items()
            if number not in known and name.partition("_")[2].partition("_")[0] in self._parts
        ]
        if unknown:
            raise ConfigError(
                f"the tables {self._names.prefix}_* are those of a later release of aiotaskq"
                f" ({', '.join(unknown)}): upgrade this one"
            )

    async def _is_complete(self, connection: Connection) -> bool:
        """Return whether a release without the table of steps has made all that is needed."""
        return self._parts == ("results",) and bool(
            await connection.fetchval(_RESULTS_ARE_COMPLETE, self._names.table("results"))
        )
