"""Roles of a PostgreSQL server: each suffices for its programs, and for nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import asyncpg
import pytest

from aiotaskq.drivers.postgres import PostgresBroker
from aiotaskq.drivers.postgres.permissions import ROLES
from aiotaskq.errors import ConfigError
from tests.drivers.postgres.roles import SCENARIOS
from tests.servers import PostgresServer

Make = Callable[[str], str]


@pytest.fixture
async def login(postgres_server: PostgresServer, postgres_url: str) -> None:
    """The tables, made by another role than those that use them."""
    await PostgresBroker(postgres_url).migrate()
    backend = PostgresBroker(postgres_url).backend()
    await backend.migrate()


@pytest.fixture
def role(postgres_server: PostgresServer, postgres_url: str, login: None) -> Iterator[Make]:
    """Returns the URL of a role with the rights of a kind of program, and no others."""
    database = postgres_url.rpartition("/")[2]
    made = []

    def make(kind: str) -> str:
        name = f"{kind}_{database}"
        postgres_server.sql(f"CREATE ROLE {name} LOGIN", database=database)
        made.append(name)
        if kind in ROLES:
            postgres_server.sql(*ROLES[kind].grants(name), database=database)
        return postgres_url.replace(f"//{postgres_server.user}@", f"//{name}@")

    yield make
    for name in made:
        postgres_server.sql(f"DROP OWNED BY {name}", f"DROP ROLE {name}", database=database)


@pytest.mark.parametrize("kind", SCENARIOS)
async def test_the_rights_of_the_how_to_suffice(
    role: Make, postgres_url: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.DEBUG, logger="aiotaskq")
    await SCENARIOS[kind](role(kind), postgres_url)
    assert "permission denied" not in caplog.text


FORBIDDEN = {
    "sender": [
        "SELECT body FROM aiotaskq_messages",
        "DELETE FROM aiotaskq_messages",
        "SELECT * FROM aiotaskq_results",
        "SELECT * FROM aiotaskq_dead",
        "UPDATE aiotaskq_consumers SET lease_until = 0",
        "INSERT INTO aiotaskq_schedules (id, revision, body) VALUES ('a', 'b', '')",
    ],
    "reader": [
        "SELECT body FROM aiotaskq_messages",
        "DELETE FROM aiotaskq_results",
        "INSERT INTO aiotaskq_results (task_id, status) VALUES ('a', 'SUCCESS')",
        "INSERT INTO aiotaskq_messages (id, queue, priority, body) VALUES ('a', 'q', 0, '')",
    ],
    "client": ["SELECT * FROM aiotaskq_dead", "UPDATE aiotaskq_messages SET body = ''"],
    "worker": ["SELECT * FROM aiotaskq_schedules"],
    "scheduler": ["SELECT body FROM aiotaskq_messages", "DELETE FROM aiotaskq_results"],
    "operator": ["INSERT INTO aiotaskq_consumers (id) VALUES ('a')"],
}
FOR_NOBODY = [
    "CREATE TABLE t (a integer)",
    "DROP TABLE aiotaskq_messages",
    "TRUNCATE aiotaskq_messages",
    "ALTER TABLE aiotaskq_messages ADD COLUMN x text",
    "DELETE FROM aiotaskq_migrations",
    "INSERT INTO aiotaskq_migrations (number, name) VALUES (999, 'x_broker')",
]


@pytest.mark.parametrize("kind", ROLES)
async def test_a_role_may_do_nothing_else(role: Make, kind: str) -> None:
    connection = await asyncpg.connect(role(kind))
    for statement in [*FORBIDDEN.get(kind, []), *FOR_NOBODY]:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    await connection.close()


async def test_a_role_that_migrates_needs_to_create_and_nothing_in_the_tables(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    database = postgres_url.rpartition("/")[2]
    migrator, user = f"migrator_{database}", f"user_{database}"
    postgres_server.sql(
        f"CREATE ROLE {migrator} LOGIN",
        f"CREATE ROLE {user} LOGIN",
        f"GRANT USAGE, CREATE ON SCHEMA public TO {migrator}",
        database=database,
    )
    url = postgres_url.replace(f"//{postgres_server.user}@", f"//{migrator}@")
    broker = PostgresBroker(url)
    assert await broker.migrate()
    await broker.backend().migrate()
    assert not await broker.migrate()
    limited = PostgresBroker(url.replace(migrator, user))
    await limited.open()  # all is there; it needs no right to find that
    with pytest.raises(ConfigError, match="permission denied"):
        await limited.depth()
    await limited.close()
    postgres_server.sql(
        f"DROP OWNED BY {migrator}", f"DROP ROLE {migrator}", f"DROP ROLE {user}", database=database
    )
