"""Keys of rows that another program has written, at the end of all keys and shortly before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Dead, Done
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.drivers.sqlite.spoilt_keys import LAST_KEY
from tests.drivers.sqlite.tools import envelope, names, opened, rows, run, swept, taken

MESSAGE = (
    "INSERT INTO aiotaskq_messages (seq, id, queue, priority, due_at, body)"
    " VALUES ({}, 'odd', 'q', 0, {}, '')"
)


@pytest.mark.parametrize("key", [LAST_KEY + 5, LAST_KEY, LAST_KEY - 1, 2**63 - 1, 0, -5])
async def test_a_message_falls_due_where_no_other_has_a_sound_key(
    broker: SQLiteBroker, path: Path, key: int
) -> None:
    run(path, MESSAGE.format(key, 1.0))
    assert (await broker.maintain()).promoted == 1
    assert names(await taken(broker, 1)) == ["odd"]


@pytest.mark.parametrize("due_at", ["NULL", "1.0"])
@pytest.mark.parametrize("key", [LAST_KEY - 1, LAST_KEY - 2, LAST_KEY, 2**63 - 2])
async def test_messages_fall_due_behind_a_key_near_the_end(
    broker: SQLiteBroker, path: Path, key: int, due_at: str
) -> None:
    await swept(broker)  # the next one comes later than the end of this test
    run(path, MESSAGE.format(key, due_at))
    await broker.publish([envelope(name, delay=0.01) for name in "abcd"])
    assert sorted(names(await taken(broker, 5))) == ["a", "b", "c", "d", "odd"]


async def test_a_held_message_keeps_the_key_that_its_receipt_names(
    broker: SQLiteBroker, path: Path
) -> None:
    await swept(broker)  # the next one comes later than the end of this test
    run(path, MESSAGE.format(LAST_KEY + 5, "NULL"))
    await broker.publish([envelope("good"), envelope("waits")])
    consumer = await opened(broker)
    got = await consumer.fetch(2, 0)
    await swept(broker)
    assert not await consumer.settle([Done(one) for one in got])
    assert await broker.depth() == {"q": Depth(ready=1)}
    await swept(broker)
    assert rows(path, f"SELECT count(*) FROM aiotaskq_messages WHERE seq < {LAST_KEY}") == [(1,)]
    await consumer.close()


async def test_a_consumer_keeps_its_number_after_a_key_right_before_the_spoilt_ones_was_replaced(
    broker: SQLiteBroker, path: Path
) -> None:
    run(
        path,
        "INSERT INTO aiotaskq_consumers (number, id, name, queues, lease_until)"
        f" VALUES ({LAST_KEY - 1}, 'x', 'x', '[]', 9e99)",
    )
    first = await opened(broker)  # its number is a spoilt one, and goes once
    await swept(broker)
    second = await opened(broker)
    consumer = await opened(broker)
    await second.close()
    for _ in range(2):
        await swept(broker)
        await broker.publish([envelope("a")])
        [got] = await consumer.fetch(1, 0)
        assert not await consumer.settle([Done(got)])
    await consumer.close()
    await first.close()


async def test_a_counter_that_is_a_huge_fraction_is_replaced(
    broker: SQLiteBroker, path: Path
) -> None:
    consumer = await opened(broker)
    await broker.publish([envelope("a"), envelope("b")])
    first, second = await consumer.fetch(2, 0)
    assert not await consumer.settle([Dead(first, "bad")])
    run(path, "UPDATE sqlite_sequence SET seq = 9e99 WHERE name = 'aiotaskq_dead'")
    await swept(broker)
    assert not await consumer.settle([Dead(second, "bad")])
    assert names(await broker.dead("q")) == ["b", "a"]
    await consumer.close()
