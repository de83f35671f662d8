"""Plans of the statements that run for each task, where a million messages wait."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from aiotaskq.drivers.postgres import PostgresBroker
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.drivers.postgres.sql import consumers as consumers_sql
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from tests.servers import PostgresServer

ROWS = 1_000_000
FILL = f"""
INSERT INTO aiotaskq_messages (id, queue, priority, due_at, body)
SELECT md5(n::text), CASE WHEN n % 5 = 0 THEN 'other' ELSE 'q' END,
    CASE WHEN n % 100 = 0 THEN 9 ELSE 0 END, CASE WHEN n % 10 = 0 THEN 4e9 + n END, 'body'
FROM generate_series(1, {ROWS}) AS n
"""
# Consumers, and what they hold.
HOLD = """
INSERT INTO aiotaskq_consumers (id, name, queues, about, lease, lease_until, beat)
SELECT 'c' || n, 'c', '{q}', '', 60, 4e9, 0 FROM generate_series(1, 50) AS n;
UPDATE aiotaskq_messages SET consumer = seq % 50 + 1, token = 1 WHERE seq <= 5000;
INSERT INTO aiotaskq_cancelled (id, until)
SELECT 'cancelled ' || n, 4e9 FROM generate_series(1, 3000) AS n;
"""


@pytest.fixture
async def crowded(
    postgres_server: PostgresServer, postgres_url: str
) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    broker = PostgresBroker(postgres_url)
    await broker.migrate()
    await broker.open()
    # As the driver's own are, settings and all.
    connection = await broker._pool.connect()
    # Indexes are made faster at once than row by row.
    indexes = await connection.fetch(
        "SELECT indexname, indexdef FROM pg_indexes"
        " WHERE tablename = 'aiotaskq_messages' AND indexname !~ 'pkey'"
    )
    await connection.execute(f"DROP INDEX {', '.join(row['indexname'] for row in indexes)}")
    await connection.execute(FILL, timeout=60)
    for row in indexes:
        await connection.execute(row["indexdef"], timeout=60)
    await connection.execute(HOLD, timeout=60)
    await connection.execute("ANALYZE", timeout=60)
    yield connection
    await connection.close()
    await broker.close()


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a plan's steps, each with those below it."""
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


def rows_of(step: dict[str, Any]) -> float:
    return float(step.get("Actual Rows", 0) * step.get("Actual Loops", 1))


async def explain(
    connection: asyncpg.Connection[asyncpg.Record], template: str, types: str, values: str
) -> list[dict[str, Any]]:
    """Run a statement as one that is prepared, by the plan that is made for all values."""
    around = connection.transaction()
    await around.start()
    try:
        await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        await connection.execute(
            f"PREPARE p ({types}) AS {PostgresNames('aiotaskq').render(template)}"
        )
        told = await connection.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) EXECUTE p ({values})"
        )
        await connection.execute("DEALLOCATE p")
    finally:
        await around.rollback()  # each finds the same
    return nodes(json.loads(told)[0]["Plan"])


RECEIPTS = f"ARRAY{list(range(1, 5000, 50))}, array_fill(1::bigint, ARRAY[100])"
BODIES = "ARRAY['x','y'], ARRAY['q','q'], ARRAY[0,9]::int2[], ARRAY['b','c']::bytea[]"
IDS = f"ARRAY{[hashlib.md5(str(n).encode()).hexdigest() for n in range(6001, 6101)]}"
TIMES = "ARRAY[NULL, 5]::float8[], ARRAY[1, NULL]::float8[]"
FETCH = "float8, bigint, bigint, text[], bigint, boolean"
PUBLISH = "float8, text, text[], text[], int2[], bytea[]"
PUBLISH_ANY = f"{PUBLISH}, float8[], float8[], float8[], float8[], boolean[]"
HOT = {
    "publish": (messages_sql.ADD, PUBLISH, f"0, 'call', {BODIES}"),
    "publish with conditions": (
        messages_sql.ADD_ANY,
        PUBLISH_ANY,
        f"0, 'call 2', {BODIES}, {TIMES}, {TIMES}, ARRAY[true, false]",
    ),
    "fetch": (messages_sql.TAKE, FETCH, "0, 7, 2, ARRAY['q'], 100, true"),
    "fetch from two": (messages_sql.TAKE, FETCH, "0, 8, 2, ARRAY['nothing', 'other'], 100, true"),
    "settle": (messages_sql.DONE, "bigint, bigint[], bigint[]", f"2, {RECEIPTS}"),
    "hand back": (messages_sql.RELEASE, "bigint, bigint[], bigint[]", f"2, {RECEIPTS}"),
    "promote": (messages_sql.PROMOTE, "float8, bigint", "2.4e9, 1000"),
    "news": (consumers_sql.NEWS, "bigint, text[]", "7, ARRAY['q']"),
    "take back": (messages_sql.TAKE_BACK, "bigint, bigint", "7, 1000"),
    "cancel": (messages_sql.CANCEL, "float8, text[]", f"0, {IDS}"),
    "look what there is to do": (consumers_sql.OVERVIEW, "float8, float8", "0, NULL"),
}
MOVED = {
    **dict.fromkeys(["fetch", "fetch from two", "settle", "hand back", "take back", "cancel"], 100),
    "promote": 1000,
}
MOST_PAGES = 20_000  # touched for a hundred or a thousand messages; the table has ten thousand


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_no_statement_of_the_hot_path_reads_or_sorts_the_backlog(
    crowded: asyncpg.Connection[asyncpg.Record],
) -> None:
    size = await crowded.fetchval("SELECT relpages FROM pg_class WHERE relname = $1", _MESSAGES)
    assert size > 5_000, "the table is too small to tell anything"
    for name, (template, types, values) in HOT.items():
        steps = await explain(crowded, template, types, values)
        for step in steps:
            kind = step["Node Type"]
            assert kind not in ("Seq Scan", "Bitmap Heap Scan") or step["Relation Name"] in _TINY, (
                f"{name}: {step}"
            )
            assert kind != "Sort" or rows_of(step) <= 1000, f"{name}: {step}"
            assert rows_of(step) <= 2_000, f"{name}: {step}"
            assert step.get("Rows Removed by Filter", 0) <= 1000, f"{name}: {step}"
        assert max(map(rows_of, steps)) >= MOVED.get(name, 1), f"{name} did nothing"
        pages = steps[0]["Shared Hit Blocks"] + steps[0]["Shared Read Blocks"]
        assert pages <= MOST_PAGES, f"{name}: {pages} pages"


_MESSAGES = "aiotaskq_messages"
_TINY = ("aiotaskq_consumers", "aiotaskq_silence")


async def test_a_plan_made_for_an_empty_table_is_right_for_a_full_one(
    postgres_url: str,
) -> None:
    broker = PostgresBroker(postgres_url, pool_size=1)
    await broker.open()
    consumer = broker.consumer(["q"], name="w", lease=600)
    await consumer.open()
    await broker._pool.fetch("VACUUM ANALYZE")
    for _ in range(8):  # from the sixth time on, the plan is kept
        assert not await consumer.fetch(10, 0)
    await broker._pool.fetch(FILL.replace(f"{ROWS}", "50000"))
    await broker._pool.fetch("SELECT pg_stat_force_next_flush()")
    before = await _rows_read(broker)
    for _ in range(5):
        assert len(await consumer.fetch(10, 0)) == 10
    await broker._pool.fetch("SELECT pg_stat_force_next_flush()")
    assert await _rows_read(broker) == before
    await consumer.close()
    await broker.close()


async def _rows_read(broker: PostgresBroker) -> int:
    """Return how many rows of messages were read one after the other, without an index."""
    [row] = await broker._pool.fetch(
        "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'aiotaskq_messages'"
    )
    return int(row[0])
