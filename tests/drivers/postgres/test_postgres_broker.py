"""What only the PostgreSQL broker has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import pytest

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Dead, Done, Release
from aiotaskq.drivers.postgres import PostgresBroker
from aiotaskq.drivers.postgres.consumer import PostgresConsumer
from aiotaskq.drivers.postgres.messages import insert, notify_on_commit
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from aiotaskq.drivers.postgres.url import parse_url
from aiotaskq.errors import BrokerUnavailable, ConfigError, EncodeError, LeaseLost
from tests.servers import PostgresServer

PATIENCE = 30.0
Join = Callable[..., Awaitable[PostgresConsumer]]


def envelope(name: str, **fields: Any) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": b"body", **fields})


def ids(got: Sequence[Delivery]) -> list[str]:
    return [one.id for one in got]


@pytest.fixture
async def broker(postgres_url: str) -> AsyncIterator[PostgresBroker]:
    broker = PostgresBroker(postgres_url)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def database(
    broker: PostgresBroker, postgres_url: str
) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection beside the driver's own, to a database that has the tables."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


@pytest.fixture
async def join(broker: PostgresBroker) -> AsyncIterator[Join]:
    """Open consumers."""
    made: list[PostgresConsumer] = []

    async def join(*queues: str) -> PostgresConsumer:
        consumer = broker.consumer(queues or ["q"], name="w", lease=60)
        await consumer.open()
        made.append(consumer)
        return consumer

    yield join
    for consumer in made:
        await consumer.close()


async def until(true: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await true():
            await asyncio.sleep(0.01)


async def waiting(database: asyncpg.Connection[asyncpg.Record], count: int) -> None:
    """Wait until so many consumers have said that they wait."""
    query = "SELECT count(*) FROM aiotaskq_consumers WHERE waiting"

    async def all_wait() -> bool:
        return bool(await database.fetchval(query) == count)

    await until(all_wait)
    await asyncio.sleep(0.05)  # each looks once more, and sleeps


def counted(broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every statement that the broker runs is added from now on."""
    pool, ran = broker._pool, list[str]()
    fetch = pool.fetch

    async def noting(template: str, *arguments: Any, repeat: bool = True) -> list[asyncpg.Record]:
        ran.append(template)
        return await fetch(template, *arguments, repeat=repeat)

    monkeypatch.setattr(pool, "fetch", noting)
    return ran


def losing(broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Let the answer to the next run of a statement be lost."""
    pool = broker._pool
    fetch = pool.fetch

    async def failing(template: str, *arguments: Any, repeat: bool = True) -> Any:
        rows = await fetch(template, *arguments, repeat=repeat)
        if template == lost:
            monkeypatch.setattr(pool, "fetch", fetch)
            raise BrokerUnavailable("the answer was lost")
        return rows

    monkeypatch.setattr(pool, "fetch", failing)


def losing_commit(broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the answer to the end of the next transaction be lost."""
    pool = broker._pool
    transact = pool.transact

    async def failing(work: Any, *, repeat: bool) -> Any:
        await transact(work, repeat=repeat)
        monkeypatch.setattr(pool, "transact", transact)
        raise BrokerUnavailable("the answer was lost")

    monkeypatch.setattr(pool, "transact", failing)


# --- waking -------------------------------------------------------------------------------------


async def test_as_many_are_woken_as_there_is_work_for(
    broker: PostgresBroker,
    join: Join,
    database: asyncpg.Connection[asyncpg.Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle = [asyncio.create_task((await join()).fetch(1, PATIENCE)) for _ in range(10)]
    await waiting(database, 10)
    ran = counted(broker, monkeypatch)
    await broker.publish([envelope("a"), envelope("b")])
    await asyncio.sleep(0.2)
    assert ran.count(messages_sql.TAKE) == 2
    done = [task.result() for task in idle if task.done()]
    assert sorted(ids([one for got in done for one in got])) == ["a", "b"]
    await broker.publish([envelope(f"{number}") for number in range(8)])
    assert len(await asyncio.gather(*idle)) == 10


async def test_nobody_is_notified_where_nobody_waits(
    broker: PostgresBroker,
    join: Join,
    database: asyncpg.Connection[asyncpg.Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = await join()
    heard: list[object] = []
    for channel in ("aiotaskq_wake", f"aiotaskq_{consumer._number}"):
        await database.add_listener(channel, lambda *notice: heard.append(notice))
    for number in range(5):
        await broker.publish([envelope(f"{number}")])
        [got] = await consumer.fetch(1, 0)
        await consumer.settle([Done(got)])
    await database.execute("SELECT pg_notify('aiotaskq_wake', 'last')")
    await until(lambda: _true(heard))
    assert len(heard) == 1


async def _true(value: object) -> bool:
    return bool(value)


async def test_who_goes_to_work_leaves_the_waiting_to_others(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    """One that has taken something is not noted as waiting, so what comes next is not its."""
    for _ in range(10):
        first, second = await join(), await join()
        both = [asyncio.create_task(one.fetch(1, PATIENCE)) for one in (first, second)]
        await waiting(database, 2)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await broker.publish([envelope("a")])
        await broker.publish([envelope("b")])
        assert sorted(ids([one for got in await asyncio.gather(*both) for one in got])) == [
            "a",
            "b",
        ]
        assert loop.time() - began < 1.5, "one of them was only found by looking"
        for consumer in (first, second):
            await consumer.close()
        await broker.purge("q")


async def test_a_lost_connection_for_notices_is_replaced(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    consumer = await join()
    task = asyncio.create_task(consumer.fetch(1, PATIENCE))
    await waiting(database, 1)
    listening = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query ILIKE 'LISTEN%'"
    )
    assert await database.fetchval(listening) == 1
    await asyncio.sleep(0.2)
    await broker.publish([envelope("a")])
    assert ids(await task) == ["a"]


async def test_what_is_stored_in_a_transaction_is_there_when_it_commits(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    consumer = await join()
    task = asyncio.create_task(consumer.fetch(1, PATIENCE))
    await waiting(database, 1)
    names = broker._pool.names
    for commits in (False, True):
        transaction = database.transaction()
        await transaction.start()
        assert not await insert(database.fetch, names, [envelope("a", unique=True)])
        await notify_on_commit(database.fetch, names)
        await asyncio.sleep(0.05)
        assert not task.done()
        await (transaction.commit() if commits else transaction.rollback())
    async with asyncio.timeout(1.5):  # by the notice, not by looking
        assert ids(await task) == ["a"]


# --- answers that are lost ----------------------------------------------------------------------


async def test_what_a_fetch_took_whose_answer_was_lost_comes_with_the_next(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join()
    await broker.publish([envelope(one) for one in "abcde"])
    losing(broker, monkeypatch, messages_sql.TAKE)
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    assert await broker.depth() == {"q": Depth(ready=2, held=3)}
    first = await consumer.fetch(2, 0)
    second = await consumer.fetch(5, 0)
    third = await consumer.fetch(5, 0)
    assert [ids(first), ids(second), ids(third)] == [["a", "b"], ["c"], ["d", "e"]]
    assert not await consumer.settle([Done(one) for one in (*first, *second, *third)])
    assert await broker.depth() == {}


async def test_what_a_lost_answer_told_comes_in_the_order_of_queues_and_priorities(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join("q", "p")
    await broker.publish([envelope("p1", queue="p"), envelope("q1"), envelope("q2", priority=9)])
    losing(broker, monkeypatch, messages_sql.TAKE)
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    assert ids(await consumer.fetch(3, 0)) == ["q2", "q1", "p1"]


async def test_a_fetch_that_is_cancelled_while_it_wakes_others_loses_nothing(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join()
    await broker.publish([envelope(name, delay=0.0001) for name in "ab"])
    await asyncio.sleep(0.01)
    wakes = asyncio.Event()

    async def wake(work: object) -> None:
        wakes.set()
        await asyncio.sleep(PATIENCE)

    with monkeypatch.context() as patched:
        patched.setattr(broker._notifier, "wake", wake)
        fetching = asyncio.create_task(consumer.fetch(1, PATIENCE))
        await asyncio.wait_for(wakes.wait(), PATIENCE)
        fetching.cancel()
        await asyncio.wait([fetching])
    assert ids(await consumer.fetch(2, 0)) == ["a"]
    assert ids(await consumer.fetch(2, 0)) == ["b"]


async def test_what_is_cancelled_is_let_go_though_the_server_was_away(
    broker: PostgresBroker,
    join: Join,
    database: asyncpg.Connection[asyncpg.Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held for good it would keep its consumer from ever being given a suspect."""
    consumer = await join()
    await broker.publish([envelope("a")])
    await database.execute("INSERT INTO aiotaskq_cancelled VALUES ('a', 1e10)")
    fetch = broker._pool.fetch

    async def failing(template: str, *arguments: Any, repeat: bool = True) -> Any:
        if template == messages_sql.DONE:
            raise BrokerUnavailable("away")
        return await fetch(template, *arguments, repeat=repeat)

    with monkeypatch.context() as patched:
        patched.setattr(broker._pool, "fetch", failing)
        with pytest.raises(BrokerUnavailable):
            await consumer.fetch(1, 0)
    assert not await consumer.fetch(1, 0)
    assert await broker.depth() == {}


async def test_a_fetch_that_comes_too_late_takes_nothing(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join()
    losing(broker, monkeypatch, messages_sql.TAKE)
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    lost = consumer._token
    assert not await consumer.fetch(3, 0)
    await broker.publish([envelope("a")])
    late = await broker._pool.fetch(messages_sql.TAKE, 0.0, consumer._number, lost, ["q"], 3, True)
    assert late == []
    assert ids(await consumer.fetch(3, 0)) == ["a"]


@pytest.mark.parametrize("kind", [Done, Release, Dead])
async def test_what_was_settled_by_a_call_whose_answer_was_lost_is_not_lost(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    consumer = await join()
    await broker.publish([envelope("a"), envelope("b")])
    a, b = await consumer.fetch(2, 0)
    batch = [kind(a, "bad") if kind is Dead else kind(a)]
    pool = broker._pool
    transact = pool.transact

    async def failing(*arguments: Any, **more: Any) -> Any:
        await transact(*arguments, **more)
        monkeypatch.setattr(pool, "transact", transact)
        raise BrokerUnavailable("the answer was lost")

    if kind is Done:
        losing(broker, monkeypatch, messages_sql.DONE)
    else:
        monkeypatch.setattr(pool, "transact", failing)
    with pytest.raises(BrokerUnavailable):
        await consumer.settle(batch)
    assert await consumer.settle(batch) == []
    assert ids(await consumer.settle(batch)) == ["a"]  # by now it is known
    assert await consumer.settle([Done(b)]) == []
    assert (await broker.depth()).get("q", Depth()).held == 0


async def test_a_lease_that_began_without_an_answer_is_begun_once(
    broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60)
    losing_commit(broker, monkeypatch)
    with pytest.raises(BrokerUnavailable):
        await consumer.open()
    await consumer.open()
    assert [one.id for one in await broker.consumers()] == [consumer.id]
    await consumer.close()
    assert not await broker.consumers()


async def test_after_a_lost_lease_nothing_counts_as_settled_by_a_lost_answer(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    [got] = await consumer.fetch(1, 0)
    losing(broker, monkeypatch, messages_sql.DONE)
    with pytest.raises(BrokerUnavailable):
        await consumer.settle([Done(got)])
    lease = broker.lease(consumer.grant)
    await lease.end("killed")
    await lease.close()
    assert ids(await consumer.settle([Done(got)])) == ["a"]


async def test_a_server_that_is_killed_keeps_what_was_stored_and_held(
    broker: PostgresBroker, join: Join, postgres_server: PostgresServer
) -> None:
    consumer = await join()
    batch = [envelope(f"{number}") for number in range(50)]
    await broker.publish(batch, call_id="call")
    held = await consumer.fetch(20, 0)
    postgres_server.kill()  # blocks the loop, so that nobody can have seen it
    postgres_server.start()
    await broker.publish(batch, call_id="call")
    assert await broker.depth() == {"q": Depth(ready=30, held=20)}
    assert not await _patiently(lambda: consumer.settle([Done(one) for one in held]))
    assert len(await _patiently(lambda: consumer.fetch(50, 0))) == 30


async def _patiently(call: Callable[[], Awaitable[Sequence[Delivery]]]) -> Sequence[Delivery]:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except BrokerUnavailable:
                await asyncio.sleep(0.05)


# --- races --------------------------------------------------------------------------------------


async def test_who_is_given_up_in_the_middle_of_a_fetch_loses_what_that_took(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    lease = broker.lease(consumer.grant)
    transaction = database.transaction()
    await transaction.start()
    statement = broker._pool.names.render(messages_sql.TAKE)
    rows = await database.fetch(statement, 0.0, consumer._number, 1, ["q"], 5, True)
    assert [row["id"] for row in rows] == [None, "a"]
    assert await lease.renew(), "a sign of life waits for no fetch"
    ending = asyncio.create_task(lease.end("killed"))
    locks = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    await until(lambda: database.fetchval(locks))
    assert not ending.done()
    await transaction.commit()
    assert await ending == 1
    with pytest.raises(LeaseLost):
        await consumer.fetch(1, 0)
    [got] = await (await join()).fetch(1, 0)
    assert (got.id, got.crashes, got.crash_note) == ("a", 1, "killed")
    await lease.close()


async def test_what_was_cancelled_while_it_was_being_stored_is_not_handed_out(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    transaction = database.transaction()
    await transaction.start()
    await insert(database.fetch, broker._pool.names, [envelope("a"), envelope("b")])
    await broker.cancel(["a"])
    await transaction.commit()
    consumer = await join()
    assert ids(await consumer.fetch(5, 0)) == ["b"]
    assert await broker.depth() == {"q": Depth(held=1)}


async def test_cancelling_what_waits_takes_no_turn_with_a_fetch(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    """One that is being taken meanwhile counts as held, and is spared."""
    consumer = await join()
    await broker.publish([envelope("a")])
    transaction = database.transaction()
    await transaction.start()
    statement = broker._pool.names.render(messages_sql.TAKE)
    await database.fetch(statement, 0.0, consumer._number, 1, ["q"], 5, True)
    cancelling = asyncio.create_task(broker.cancel(["a"], running=False))
    locks = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    await until(lambda: database.fetchval(locks))
    await transaction.commit()
    assert list(await cancelling) == ["a"]
    assert not (await consumer.news()).cancelled


async def test_a_server_that_was_restarted_is_no_reason_to_give_anybody_up(
    broker: PostgresBroker, join: Join, postgres_server: PostgresServer
) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    await consumer.fetch(1, 0)
    postgres_server.restart()
    broker._time_shift = 61.0
    newcomer = broker.consumer(["q"], name="w", lease=60)
    await _opened(newcomer)
    assert (await broker.maintain()).reclaimed == 0
    broker._time_shift = 122.0
    assert (await broker.maintain()).reclaimed == 1  # once only
    await newcomer.close()


async def _opened(consumer: PostgresConsumer) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await consumer.open()
            except BrokerUnavailable:
                await asyncio.sleep(0.05)


@pytest.mark.may_block("it stands still on purpose")
async def test_a_process_that_stands_still_in_a_transaction_holds_up_nobody_for_long(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    broker = PostgresBroker(postgres_url, timeout=1.0)
    await broker.open()
    pool, name = broker._pool, postgres_url.rpartition("/")[2]
    lock = "SELECT single FROM aiotaskq_silence FOR UPDATE"

    async def stand_still(connection: asyncpg.Connection[asyncpg.Record]) -> list[str]:
        await connection.fetch(lock)
        return postgres_server.sql(lock, database=name)  # blocks the event loop

    with pytest.raises(BrokerUnavailable):
        await pool.transact(stand_still, repeat=False)
    assert len(await pool.fetch(lock)) == 1
    await broker.close()


# --- the tables ---------------------------------------------------------------------------------


async def test_what_is_done_leaves_nothing_behind(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    """With what autovacuum does from time to time, the tables stay as large as one round."""
    consumer = await join()
    sizes: list[int] = []
    for round_ in range(4):
        for start in range(0, 3000, 500):
            await broker.publish([envelope(f"{round_}.{start + n}") for n in range(500)])
        while got := await consumer.fetch(1000, 0):
            assert not await consumer.settle([Done(one) for one in got])
        for table in ("messages", "calls", "consumers"):
            await database.execute(f"VACUUM aiotaskq_{table}")
        size = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname ~ '^aiotaskq'"
        sizes.append(int(await database.fetchval(size)))
    # An index's empty pages are used again one cleaning later.
    assert sizes[-1] <= sizes[1] * 1.1, sizes


async def test_calls_and_ids_are_forgotten_when_their_time_is_over(
    broker: PostgresBroker, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    await broker.publish([envelope("a", unique=True)], call_id="call")
    await broker.cancel(["b"])
    left = (
        "SELECT (SELECT count(*) FROM aiotaskq_calls), (SELECT count(*) FROM aiotaskq_recent),"
        " (SELECT count(*) FROM aiotaskq_cancelled)"
    )
    for passed, expected in (
        (0.0, (1, 1, 1)),
        (61.0, (0, 1, 1)),
        (86_500.0, (0, 0, 1)),
        (8 * 86_400.0, (0, 0, 0)),
    ):
        broker._time_shift = passed
        await broker.maintain()
        assert tuple(await database.fetchrow(left) or ()) == expected


async def test_cleaning_is_set_up_for_rows_that_come_and_go(
    database: asyncpg.Connection[asyncpg.Record],
) -> None:
    query = "SELECT unnest(reloptions) FROM pg_class WHERE relname = 'aiotaskq_messages'"
    options = {row[0] for row in await database.fetch(query)}
    assert {"autovacuum_vacuum_scale_factor=0", "vacuum_truncate=false"} <= options


async def test_messages_are_readable_in_psql(
    broker: PostgresBroker, postgres_server: PostgresServer, postgres_url: str
) -> None:
    await broker.publish([envelope("a", body=b'{"task":"add"}', priority=3)])
    lines = postgres_server.sql(
        "SELECT id, queue, priority, convert_from(body, 'UTF8') FROM aiotaskq_messages",
        database=postgres_url.rpartition("/")[2],
    )
    assert lines == ['a|q|3|{"task":"add"}']


# --- what it is asked ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
async def test_an_id_that_cannot_be_kept_is_refused_and_stores_nothing(
    broker: PostgresBroker, name: str
) -> None:
    with pytest.raises(EncodeError):
        await broker.publish([envelope("a"), envelope(name)])
    assert await broker.depth() == {}


async def test_a_reason_may_hold_anything(broker: PostgresBroker, join: Join) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    [got] = await consumer.fetch(1, 0)
    assert not await consumer.settle([Dead(got, "a\0b\ud800")])
    [letter] = await broker.dead("q")
    assert letter.reason == "a\\x00b\\ud800"


async def test_what_is_no_key_is_refused(broker: PostgresBroker) -> None:
    with pytest.raises(ConfigError, match="not the key"):
        await broker.dead("q", before="x")


def test_listen_leads_elsewhere_with_the_same_user_and_database() -> None:
    parsed = parse_url("postgresql://u:secret@pool:6432/d?listen=db:5433&sslmode=require")
    assert parsed.shown == "postgresql://u:***@pool:6432/d?sslmode=require"
    assert parsed.listen is not None
    assert parsed.listen.arguments["dsn"].startswith("postgresql://db:5433/d?sslmode=require")
    assert (parsed.listen.arguments["user"], parsed.listen.arguments["password"]) == ("u", "secret")


@pytest.mark.parametrize("listen", ["", "a/b", "postgresql:%2F%2Fu:secret%40h"])
def test_listen_that_is_no_place_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="listen") as refused:
        PostgresBroker(f"postgresql://h/d?listen={listen}")
    assert "secret" not in str(refused.value)


def test_a_whole_url_to_listen_at_is_an_argument() -> None:
    broker = PostgresBroker("postgresql://h/d", listen_url="postgresql://u:secret@db/d")
    assert broker.clone()._url.listen is not None
    assert "secret" not in repr(broker) + broker.url
    backend = broker.backend()
    assert backend._pool.url.listen is not None


async def test_a_sign_of_life_after_a_silence_is_seen_only_when_all_are_spared(
    broker: PostgresBroker, join: Join, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    first = await join()
    await join()
    silent = 0.9 * first.grant.seconds
    await database.execute(
        "UPDATE aiotaskq_consumers SET beat = beat - $1, lease_until = lease_until - 2 * $1", silent
    )
    lapsed = (
        "SELECT count(*) FROM aiotaskq_consumers WHERE lease_until <= extract(epoch FROM now())"
    )
    beats = "SELECT max(beat) FROM aiotaskq_consumers"
    before = await database.fetchval(beats)
    assert await database.fetchval(lapsed) == 2
    lease = broker.lease(first.grant)
    async with database.transaction():
        await database.execute("SELECT FROM aiotaskq_silence FOR UPDATE")  # somebody judges
        renewing = asyncio.create_task(lease.renew())

        async def waits() -> bool:
            return bool(await database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await until(waits)
        assert await database.fetchval(beats) == before
    assert await renewing
    assert await database.fetchval(beats) > before
    assert await database.fetchval(lapsed) == 0
    await lease.close()
