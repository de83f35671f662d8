"""The tables of the driver: made, brought up to date, and looked at.

Each file in `migrations` leads a step further: ``NNN_<part>.sql`` or ``NNN_<part>_<what>.sql``. The
part, results or broker, says who needs it: who keeps results only has no other tables. A version
table tells which of them were applied.
"""

from __future__ import annotations

from importlib.abc import Traversable
from importlib.resources import files
from typing import NamedTuple

import asyncpg

from aiotaskq.drivers.postgres.link import Connection
from aiotaskq.drivers.postgres.names import Names
from aiotaskq.errors import ConfigError


class Migration(NamedTuple):
    """One step.

    Attributes:
        number: Its place among all.
        name: Of its file, without the ending.
        part: Who needs it.
        template: Statements, with ``{prefix}``.
    """

    number: int
    name: str
    part: str
    template: str


def _read(file: Traversable) -> Migration:
    name = file.name.removesuffix(".sql")
    number, part = name.split("_")[:2]
    return Migration(int(number), name, part, file.read_text(encoding="utf-8"))


# Now, and not when they are needed: that may be on an event loop, which must not read files.
_FILES = (files("aiotaskq.drivers.postgres") / "migrations").iterdir()
MIGRATIONS = sorted(_read(file) for file in _FILES if file.name.endswith(".sql"))

_APPLIED = 'SELECT number, name FROM "{prefix}_migrations" ORDER BY number'
# Its version is no secret, and a user who may not create tables has to be able to see it.
_CREATE = """\
CREATE TABLE IF NOT EXISTS "{prefix}_migrations" (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT ON "{prefix}_migrations" TO PUBLIC;
"""
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
# By way of a table: the function alone may go by what was true before the lock.
_EXISTS = "SELECT EXISTS (SELECT FROM pg_class WHERE oid = to_regclass($1))"
# Releases before there was a version table made one table, of results, which may be complete.
_RESULTS_ARE_COMPLETE = """
SELECT EXISTS (
    SELECT FROM pg_attribute
    WHERE attrelid = to_regclass($1) AND attname = 'history' AND NOT attisdropped
)
"""


class Migrations:
    """What some parts of the driver need in a database.

    Args:
        names: Of the tables.
        parts: "results", "broker", or both.
    """

    def __init__(self, names: Names, *parts: str) -> None:
        self._names = names
        self._parts = parts
        self._wanted = [one for one in MIGRATIONS if one.part in parts]

    async def prepare(self, connection: Connection) -> None:
        """See to it that the tables are there; many processes may do so at once.

        Raises:
            ConfigError: Something is missing and this user may not make it, or a later release
                changed the tables.
        """
        if not await self.missing(connection):
            return
        try:
            await self.apply(connection)
        except asyncpg.InsufficientPrivilegeError as error:
            if await self._is_enough(connection):
                return
            raise ConfigError(
                f"the tables {self._names.prefix}_* are missing or not up to date, and this user"
                f" may not change that ({error}): have one who may create tables in the schema"
                " run `aiotaskq migrate tasks:app`, once for each release"
            ) from error

    async def missing(self, connection: Connection) -> list[Migration]:
        """Return what has not been applied.

        Raises:
            ConfigError: A later release changed the tables.
        """
        applied = await self._applied(connection)
        self._check_known(applied)
        return [one for one in self._wanted if one.number not in applied]

    async def apply(self, connection: Connection) -> list[Migration]:
        """Apply what is missing, all or nothing; return it.

        Raises:
            ConfigError: A later release changed the tables.
        """
        async with connection.transaction():
            # Should this process stand still in the middle, the others that start need not wait.
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = '10s'")
            await connection.execute(_LOCK, self._names.table("migrations"))
            missing = await self.missing(connection)
            for one in missing:
                await connection.execute(self.script(one))
        return missing

    def script(self, migration: Migration) -> str:
        """Return the statements of a step, with those that note it."""
        return self._names.render(
            f"{_CREATE}{migration.template}"
            'INSERT INTO "{prefix}_migrations" (number, name)'
            f" VALUES ({migration.number}, '{migration.name}');\n"
        )

    async def migrate(self, connection: Connection, *, dry_run: bool) -> list[tuple[str, str]]:
        """Apply what is missing, or only look; return names and statements.

        Raises:
            ConfigError: A later release changed the tables, or this user may not do so.
        """
        try:
            steps = await (self.missing(connection) if dry_run else self.apply(connection))
        except asyncpg.InsufficientPrivilegeError as error:
            raise ConfigError(
                f"this user may not make or change the tables {self._names.prefix}_* ({error}):"
                " run it as one who may, or give what --sql prints to psql"
            ) from error
        return [(one.name, self.script(one)) for one in steps]

    async def _applied(self, connection: Connection) -> dict[int, str]:
        if not await connection.fetchval(_EXISTS, self._names.table("migrations")):
            return {}
        rows = await connection.fetch(self._names.render(_APPLIED))
        return {row["number"]: row["name"] for row in rows}

    def _check_known(self, applied: dict[int, str]) -> None:
        known = {one.number for one in MIGRATIONS}
        unknown = [
            name
            for number, name in applied.items()
            if number not in known and name.split("_")[1] in self._parts
        ]
        if unknown:
            raise ConfigError(
                f"the tables {self._names.prefix}_* are those of a later release of aiotaskq"
                f" ({', '.join(unknown)}): upgrade this one"
            )

    async def _is_enough(self, connection: Connection) -> bool:
        """Tell whether an earlier release has made all that is needed, unnoted."""
        return self._parts == ("results",) and bool(
            await connection.fetchval(_RESULTS_ARE_COMPLETE, self._names.table("results"))
        )
