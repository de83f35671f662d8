"""Behaviour of the PostgreSQL result backend beyond its contract: access, and the table."""

from __future__ import annotations

import asyncio
import math
import traceback
from datetime import UTC, datetime

import asyncpg
import pytest
from msgspec import Raw

from aiotaskq.drivers.postgres import PostgresBackend, results
from aiotaskq.errors import BackendUnavailable, ConfigError, DecodeError
from tests.drivers.postgres.tools import (
    HISTORY,
    Make,
    name_of,
    outcome,
)
from tests.servers import PostgresServer

# The table as the first release made it.
EARLIER_TABLE = """
CREATE TABLE aiotaskq_results (
    task_id text PRIMARY KEY, status text NOT NULL, result jsonb, date_done timestamptz,
    traceback text, name text, args jsonb, kwargs jsonb, worker text, retries integer, queue text,
    execution_time double precision, children jsonb, expires_at timestamptz
)
"""


# --- prefixes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "x" * 41, "a\0b"])
def test_a_prefix_that_names_no_table_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        PostgresBackend("postgresql:///d", prefix=prefix)


@pytest.mark.parametrize("prefix", ["Own", 'a "b" -- {c}', "x" * 40])
async def test_a_prefix_may_hold_anything_else(make: Make, prefix: str) -> None:
    backend = await make(prefix=prefix)
    arrivals = backend.subscribe()
    assert list(await anext(arrivals)) == []
    await backend.store([outcome("a")], None)
    assert list(await anext(arrivals)) == ["a"]
    assert set(await backend.load(["a"])) == {"a"}
    assert not await (await make()).load(["a"])
    await arrivals.aclose()  # type: ignore[attr-defined]  # an async generator


# --- access -------------------------------------------------------------------------------------


async def test_the_password_of_the_url_is_used(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    name = name_of(postgres_url)
    postgres_server.sql(
        f"GRANT ALL ON SCHEMA public TO {postgres_server.guarded_user}", database=name
    )
    backend = await make(postgres_server.guarded_url(name))
    await backend.store([outcome("a")], None)
    assert set(await backend.load(["a"])) == {"a"}
    assert "***" in backend.url


async def test_a_wrong_password_is_a_config_error(
    make: Make, postgres_server: PostgresServer
) -> None:
    wrong = "not" + postgres_server.guarded_password
    with pytest.raises(ConfigError, match="password") as caught:
        await make(postgres_server.guarded_url(password=wrong))
    assert wrong not in "".join(traceback.format_exception(caught.value))


async def test_a_missing_database_is_a_config_error(
    make: Make, postgres_server: PostgresServer
) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*create"):
        await make(postgres_server.url("nowhere"))
    subscriber = PostgresBackend(postgres_server.url("nowhere")).subscribe()
    with pytest.raises(ConfigError):
        await anext(subscriber)


async def test_no_free_connection_is_not_a_config_error(
    make: Make, postgres_server: PostgresServer
) -> None:
    user = postgres_server.guarded_user
    postgres_server.sql(f"ALTER ROLE {user} CONNECTION LIMIT 0")
    try:
        with pytest.raises(BackendUnavailable, match="too many connections"):
            await make(postgres_server.guarded_url())
    finally:
        postgres_server.sql(f"ALTER ROLE {user} CONNECTION LIMIT -1")


async def test_a_user_who_may_not_create_tables_uses_what_is_there(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    name = name_of(postgres_url)
    url = postgres_server.guarded_url(name)
    with pytest.raises(ConfigError, match="permission denied"):
        await make(url)
    await make()
    postgres_server.sql(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON aiotaskq_results"
        f" TO {postgres_server.guarded_user}",
        database=name,
    )
    backend = await make(url)
    await backend.store([outcome("a")], None)
    assert set(await backend.load(["a"])) == {"a"}


async def test_many_may_open_an_empty_database_at_once(make: Make) -> None:
    backends = await asyncio.gather(*(make() for _ in range(12)))
    await backends[0].store([outcome("a")], None)
    assert set(await backends[-1].load(["a"])) == {"a"}


async def test_a_table_of_an_earlier_release_gets_what_it_lacks_once(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    await database.execute(EARLIER_TABLE)
    await database.execute(
        "INSERT INTO aiotaskq_results (task_id, status, result) VALUES ('old', 'SUCCESS', '1')"
    )
    backends = await asyncio.gather(*(make() for _ in range(12)))
    assert not await backends[0].store([outcome("new", history=HISTORY)], None)
    loaded = await backends[-1].load(["old", "new"])
    assert loaded["old"].history == ()
    assert loaded["new"].history == HISTORY


async def test_a_user_who_may_not_change_an_earlier_table_is_told_what_to_run(
    make: Make,
    database: asyncpg.Connection[asyncpg.Record],
    postgres_server: PostgresServer,
    postgres_url: str,
) -> None:
    await database.execute(EARLIER_TABLE)
    grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON aiotaskq_results TO"
    await database.execute(f"{grant} {postgres_server.guarded_user}")
    url = postgres_server.guarded_url(name_of(postgres_url))
    with pytest.raises(ConfigError, match="aiotaskq migrate"):
        await make(url)
    assert [name for name, _ in await PostgresBackend(postgres_url).migrate()] == ["001_results"]
    backend = await make(url)
    await backend.store([outcome("a", history=HISTORY)], None)
    assert (await backend.load(["a"]))["a"].history == HISTORY


async def test_a_complete_table_of_an_earlier_release_needs_no_version_table(
    make: Make,
    database: asyncpg.Connection[asyncpg.Record],
    postgres_server: PostgresServer,
    postgres_url: str,
) -> None:
    await database.execute(EARLIER_TABLE)
    await database.execute(
        "ALTER TABLE aiotaskq_results ADD COLUMN history jsonb;"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON aiotaskq_results"
        f" TO {postgres_server.guarded_user}"
    )
    backend = await make(postgres_server.guarded_url(name_of(postgres_url)))
    await backend.store([outcome("a")], None)
    assert set(await backend.load(["a"])) == {"a"}


async def test_a_backend_that_is_not_open_says_so(postgres_url: str) -> None:
    with pytest.raises(BackendUnavailable, match="not open"):
        await PostgresBackend(postgres_url).load(["a"])


# --- the table ----------------------------------------------------------------------------------


async def test_rows_are_readable_in_psql(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    backend = await make()
    await backend.store(
        [
            outcome("a", b"10", name="tasks.add", args=Raw(b"[2,8]"), kwargs=Raw(b"{}")),
            outcome("b", b'{"a":1}', worker="w1", queue="q", retries=2, children=["a"]),
        ],
        None,
    )
    columns = "task_id, status, result, name, args, kwargs, worker, retries, queue, children"
    lines = postgres_server.sql(
        f"SELECT {columns} FROM aiotaskq_results ORDER BY task_id",
        "SELECT result->>'a' FROM aiotaskq_results WHERE task_id = 'b'",
        database=name_of(postgres_url),
    )
    assert lines == [
        "a|SUCCESS|10|tasks.add|[2, 8]|{}||0||[]",
        'b|SUCCESS|{"a": 1}||||w1|2|q|["a"]',
        "1",
    ]


async def test_the_history_is_readable_in_psql(
    make: Make, postgres_server: PostgresServer, postgres_url: str
) -> None:
    await (await make()).store([outcome("a", history=HISTORY), outcome("b")], None)
    lines = postgres_server.sql(
        "SELECT history->0->>'error', history->1->>'worker' FROM aiotaskq_results ORDER BY task_id",
        database=name_of(postgres_url),
    )
    assert lines == ["ValueError: grüße|w2", "|"]


async def test_times_are_aware_and_exact(make: Make) -> None:
    moment = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC)
    backend = await make(f"{(await make())._settings['url']}?timezone=Asia/Tokyo")
    await backend.store([outcome("a", date_done=moment)], None)
    loaded = (await backend.load(["a"]))["a"]
    assert loaded.date_done is not None
    assert loaded.date_done.utcoffset() is not None
    assert loaded.date_done == moment


@pytest.mark.parametrize("ttl", [1e9, 1e300, math.inf])
async def test_a_very_long_life_is_possible(make: Make, ttl: float) -> None:
    backend = await make()
    assert not await backend.store([outcome("a")], ttl)
    assert set(await backend.load(["a"])) == {"a"}


async def test_expired_outcomes_are_deleted_in_pieces(
    make: Make, database: asyncpg.Connection[asyncpg.Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_SWEEP_ROWS", 100)
    backend = await make()
    await backend.store([outcome(f"{n}") for n in range(250)], 10)
    await backend.store([outcome("stays"), outcome("stays too")], None)
    backend._time_shift = 11.0
    backend._sweep_timer.due_at = 0.0
    left = []
    for n in range(4):
        await backend.store([outcome(f"new {n}")], 1000)
        left.append(await database.fetchval("SELECT count(*) FROM aiotaskq_results"))
    assert left == [153, 54, 5, 6]  # pieces of a hundred, then a minute of rest
    assert len(await backend.load(["stays", "stays too"])) == 2


async def test_a_row_with_an_unknown_status_is_not_an_outcome(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = await make()
    await database.execute("INSERT INTO aiotaskq_results (task_id, status) VALUES ('a', 'odd')")
    with pytest.raises(DecodeError, match="a"):
        await backend.load(["a"])
