"""The tables: plans of the statements, contents for people, and rows that go."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.drivers.sqlite import SQLiteBackend, SQLiteBroker, sql
from aiotaskq.drivers.sqlite.database import SQLiteDatabase
from aiotaskq.errors import ConfigError, DecodeError
from tests.drivers.sqlite.tools import (
    envelope,
    rows,
)


@pytest.mark.parametrize(
    ("statement", "parameters", "index"),
    [
        (sql.NEXT_READY, ("q", 100), "ready (queue=?)"),
        (sql.NEXT_SUSPECT, ("q",), "suspects (queue=?)"),
        (sql.ANY_READY, ("q",), "ready (queue=?)"),
        (sql.ANY_SUSPECT, ("q",), "suspects (queue=?)"),
        (sql.OUTLOOK, (), "suspects"),
        (sql.OUTLOOK, (), "delayed"),
        (sql.ALL_DUE, (0.0, 1000), "delayed (due_at<?)"),
        (sql.PROMOTE, (1,), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.HOLD, (1, 1, 1), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.FORGET, (1, 1, 1), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.GIVE_BACK, (1, 1, 1), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.GIVE_BACK_ALL, (1,), "held (consumer=?)"),
        (sql.HELD_BY, (1, 1000), "held (consumer=?)"),
        (sql.CANCELLED_OF, (1,), "held (consumer=? AND cancelled=?)"),
        (sql.CANCEL_WAITING, ('["a"]',), "messages_id (id=?)"),
        (sql.CANCEL_HELD, ('["a"]',), "messages_id (id=?)"),
        (sql.SWEEPS[0], (0.0, 1000), "until (until<?)"),
        (sql.SWEEPS[1], (0.0, 1000), "until (until<?)"),
        (sql.SWEEPS[2], (0.0, 1000), "until (until<?)"),
        (sql.SWEEPS[3], (0.0, 1000), "expires (expires_at<?)"),
        (sql.PURGES[0], ("q", 1000), "ready (queue=?)"),
        (sql.PURGES[1], ("q", 1000), "suspects (queue=?)"),
        (sql.NEWEST_DEAD, ("q", 9, 100), "dead_queue (queue=? AND seq<?)"),
        (sql.TAKE_DEAD, (1, "q"), "INTEGER PRIMARY KEY (rowid=?)"),
        (sql.DISCARD, ("[1]", "q"), "(queue=? AND seq=? AND rowid=?)"),
        (sql.DEAD_OUTLOOK, (0.0,), "dead_died (died_at<?)"),
        (sql.TRIM_OLD, (0.0, 1000), "dead_died (died_at<?)"),
        (sql.TRIM_QUEUE, ("q", 1000), "dead_queue (queue=?)"),
        (sql.COUNT_DEAD, (1000,), "COVERING INDEX aiotaskq_dead_queue"),
        (sql.READ_CALL, {"call": "c", "now": 0.0}, "calls_1 (call_id=?)"),
        (sql.CANCELLED_AMONG, ('["a"]',), "cancelled USING PRIMARY KEY (id=?)"),
        (sql.MAY_FOLLOW, ("a", "a", 1, 1, 1), "cancelled USING PRIMARY KEY (id=?)"),
        (sql.NUMBER_OF, ("c",), "consumers_id (id=?)"),
        (sql.HELD_AMONG, ('["a"]',), "messages_id (id=?)"),
        (sql.PORTS_OF, ("t", "n", 0.0), "PRIMARY KEY (topic=? AND network=?)"),
        (sql.LOAD, ('["a"]', 0.0), "results_1 (task_id=?)"),
        (sql.ARRIVED_SINCE, (1, 1000), "INTEGER PRIMARY KEY (rowid>? AND rowid<?)"),
    ],
    ids=lambda value: " ".join(value.split())[:30] if isinstance(value, str) else "",
)
async def test_no_statement_sorts_or_reads_more_than_it_needs(
    broker: SQLiteBroker, statement: str, parameters: tuple[Any, ...], index: str
) -> None:
    def plan(database: SQLiteDatabase) -> list[str]:
        found = database.rows(f"EXPLAIN QUERY PLAN {statement}", parameters)
        cheap = ("json_each", "CONSTANT ROW")
        return [step for *_, step in found if not any(one in step for one in cheap)]

    steps = await broker._connection.run(plan)
    assert any(index in step for step in steps), steps
    assert not any("TEMP B-TREE" in step for step in steps), steps
    # A scan of an index that is read in order up to a LIMIT is fine, one of a table is not.
    assert not any(step.startswith("SCAN") and "USING" not in step for step in steps), steps


async def test_results_can_be_read_as_text_in_the_table(backend: SQLiteBackend, path: Path) -> None:
    outcome = Outcome(
        task_id="a",
        status=TaskStatus.SUCCESS,
        result=Raw('{"x":"ü"}'.encode()),
        name="tasks.add",
        args=Raw(b"[2,8]"),
        kwargs=Raw(b"{}"),
        retries=1,
        history=(Attempt(number=1, at=1.5, worker="w", error="ValueError: \udc80"),),
    )
    packed = Outcome(task_id="b", status=TaskStatus.SUCCESS, result=Raw(b"\x81\xa1x\xc3"))
    await backend.store([outcome, packed], 60.0)
    columns = "task_id, status, result, name, args, kwargs, retries, typeof(result)"
    assert rows(path, f"SELECT {columns} FROM aiotaskq_results ORDER BY task_id") == [
        ("a", "SUCCESS", '{"x":"ü"}', "tasks.add", "[2,8]", "{}", 1, "text"),
        ("b", "SUCCESS", b"\x81\xa1x\xc3", None, None, None, 0, "blob"),
    ]
    assert rows(path, "SELECT json_extract(result, '$.x') FROM aiotaskq_results LIMIT 1") == [
        ("ü",)
    ]
    assert rows(path, "SELECT json_extract(history, '$[0].worker') FROM aiotaskq_results") == [
        ("w",),
        (None,),
    ]
    loaded = await backend.load(["a", "b"])
    assert (loaded["a"].history, loaded["b"].history) == (outcome.history, ())
    assert (bytes(loaded["a"].result), bytes(loaded["b"].result)) == (
        bytes(outcome.result),
        bytes(packed.result),
    )


async def test_rows_leave_the_file_when_their_time_is_over(
    broker: SQLiteBroker, backend: SQLiteBackend, path: Path
) -> None:
    await backend.store([Outcome(task_id="a", status=TaskStatus.SUCCESS, result=Raw(b"1"))], 60.0)
    batch = [envelope(f"{n}", unique=True) for n in range(2500)]
    await broker.publish(batch, call_id="call")
    await broker.cancel([f"other {n}" for n in range(2500)])
    broker._time_shift = 8 * 86_400.0
    for _ in range(4):
        await broker.maintain()
    for table in ("recent", "calls", "results", "cancelled"):
        assert rows(path, f"SELECT count(*) FROM aiotaskq_{table}") == [(0,)], table
    assert rows(path, "SELECT count(*) FROM aiotaskq_messages") == [(2500,)]


async def test_a_key_that_no_dead_letter_can_have_is_refused(broker: SQLiteBroker) -> None:
    for key in ("a", "", "-1", "9" * 5000):
        with pytest.raises(ConfigError, match="is not the key of a dead letter"):
            await broker.dead("q", before=key)
        assert await broker.discard("q", [key]) == 0
    assert not await broker.dead("q", before="9" * 19)


async def test_a_row_of_another_program_that_is_not_an_outcome_is_one_clear_error(
    backend: SQLiteBackend, path: Path
) -> None:
    connection = sqlite3.connect(path)
    connection.execute(
        "INSERT INTO aiotaskq_results (task_id, status, children, retries)"
        " VALUES ('a', 'LOST', '[]', 0)"
    )
    connection.commit()
    connection.close()
    with pytest.raises(DecodeError, match="the row of 'a' is not an outcome"):
        await backend.load(["a"])
