"""Values in the tables, and notices, that no program of this package has written."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, TypeAlias

import asyncpg
import pytest

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import DeadLimits
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.postgres import PostgresBackend, PostgresBroker
from aiotaskq.drivers.postgres import connection as connections
from aiotaskq.errors import (
    BackendUnavailable,
    BatchRefused,
    BrokerUnavailable,
    ConfigError,
    EncodeError,
)
from tests.drivers.postgres.tools import PATIENCE, Join, Make, envelope, ids, outcome, until
from tests.drivers.quiet import quiet_proxy
from tests.servers import PostgresServer

Database: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

INSERT = "INSERT INTO aiotaskq_messages (id, queue, priority, body, {}) VALUES ($1, 'q', 0, '', {})"


async def put(database: Database, name: str, **columns: str) -> None:
    """Insert a message with columns given as SQL."""
    await database.execute(INSERT.format(", ".join(columns), ", ".join(columns.values())), name)


async def swept(broker: PostgresBroker) -> None:
    broker._maintenance._sweep_timer.due_at = 0.0
    await broker.maintain()


# --- refusals -----------------------------------------------------------------------------------


async def test_a_settlement_that_cannot_be_stored_is_refused_and_the_others_take_effect(
    broker: PostgresBroker, join: Join
) -> None:
    consumer = await join()
    await broker.publish([envelope(name) for name in "abcde"])
    a, b, c, d, e = await consumer.fetch(5, 0)
    batch: list[Settlement] = [
        Done(a),
        Again(b, envelope("b\0")),
        Again(c, envelope("c", priority=10**6)),
        Again(d, envelope("d", delay=60.0)),
        Release(e),
    ]
    with pytest.raises(BatchRefused) as refused:
        await consumer.settle(batch)
    assert list(refused.value.errors) == [1, 2]
    assert all(isinstance(one, EncodeError) for one in refused.value.errors.values())
    assert not refused.value.answer
    depth = (await broker.depth())["q"]
    assert (depth.ready, depth.delayed, depth.held) == (1, 1, 2)
    # They are still held, and can be settled in another way.
    assert not await consumer.settle([Dead(b, "refused"), Dead(c, "refused")])
    assert (await broker.depth())["q"].dead == 2


async def test_a_repeated_call_stores_what_was_not_refused_once(broker: PostgresBroker) -> None:
    batch = [
        envelope(name, unique=unique) for name in ("a", "b\0", "c") for unique in (True, False)
    ]
    for _ in range(2):
        with pytest.raises(BatchRefused) as refused:
            await broker.publish(batch, call_id="call")
        assert list(refused.value.errors) == [2, 3]
        assert not refused.value.answer
    assert (await broker.depth())["q"].ready == 4


async def test_a_body_that_is_too_large_is_refused_unsent(
    broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.drivers.postgres.messages._LARGEST_BODY", 5_000_000)
    large = envelope("large", body=bytes(6_000_000))
    with pytest.raises(BatchRefused) as refused:
        await broker.publish([envelope("a"), large, envelope("b")])
    assert list(refused.value.errors) == [1]
    assert (await broker.depth())["q"].ready == 2


async def test_names_that_no_row_can_have_find_nothing(broker: PostgresBroker) -> None:
    assert not await broker.cancel(["a\0", "\ud800"], running=False)
    assert await broker.purge("q\0") == 0
    assert await broker.dead("q\0") == []
    assert await broker.discard("q\0", ["1"]) == 0
    assert await broker.revive("q\0", [("1", envelope("a"))]) == ["1"]
    assert not await broker.schedules().load(["a\0"])


# --- rows ---------------------------------------------------------------------------------------


async def test_a_count_of_crashes_at_its_limit_harms_nobody(
    broker: PostgresBroker, join: Join, database: Database
) -> None:
    consumer = await join()
    await put(database, "most", crashes="2147483647")
    await put(database, "least", crashes="-2147483648")
    got: list[Delivery] = list(await consumer.fetch(1, 0))
    assert ids(got) == ["most"]
    assert await broker.lease(consumer.grant).end("killed") == 1
    other = await join()
    [again] = await other.fetch(1, 0)
    assert again.crashes > 2
    assert not await other.settle([Done(again)])
    assert ids(await other.fetch(1, 0)) == ["least"]


async def test_a_message_whose_holder_does_not_exist_comes_back(
    broker: PostgresBroker, join: Join, database: Database
) -> None:
    consumer = await join()
    await put(database, "stray", consumer="987654", token="1")
    assert not await consumer.fetch(1, 0)
    await swept(broker)
    [got] = await consumer.fetch(1, 0)
    assert (got.id, got.crashes, got.crash_note) == ("stray", 1, "its holder does not exist")


@pytest.mark.parametrize("due", ["'NaN'", "'-Infinity'"])
async def test_a_due_time_that_is_no_time_delays_nothing_for_ever(
    broker: PostgresBroker, join: Join, database: Database, due: str
) -> None:
    consumer = await join()
    await put(database, "odd", due_at=due)
    await swept(broker)
    assert ids(await consumer.fetch(1, 0)) == ["odd"]


async def test_odd_consumers_are_listed_and_maintained_like_others(
    broker: PostgresBroker, join: Join, database: Database
) -> None:
    await join()
    for number, (lease, until_at, beat) in enumerate(
        [("'NaN'", "'NaN'", "'NaN'"), ("-1", "'Infinity'", "'Infinity'"), ("0", "0", "-1")]
    ):
        await database.execute(
            "INSERT INTO aiotaskq_consumers (id, name, queues, about, lease, lease_until, beat)"
            f" VALUES ('odd {number}', '', '{{NULL,a}}', '\\xff', {lease}, {until_at}, {beat})"
        )
    listed = {one.id: one.queues for one in await broker.consumers()}
    assert listed["odd 1"] == ("a",)
    await broker.maintain()
    other = await join()
    assert await broker.lease(other.grant).renew()


FORGED = (
    "INSERT INTO aiotaskq_consumers (id, name, queues, about, lease, lease_until, beat)"
    " VALUES ('forged', '', '{q}', '', $1, $2, $3)"
)
ODD = [float("inf"), float("nan"), 1e300]


@pytest.mark.parametrize("odd", ODD)
async def test_a_sign_of_life_in_the_future_hides_no_outage(
    broker: PostgresBroker, join: Join, database: Database, odd: float
) -> None:
    consumer = await join()
    await broker.publish([envelope("a")])
    [held] = await consumer.fetch(1, 0)
    await database.execute(FORGED, 60.0, odd, odd)
    # As after an outage: nobody could give a sign of life until its lease ran out.
    await database.execute(
        "UPDATE aiotaskq_consumers SET beat = beat - 100, lease_until = lease_until - 100"
        " WHERE id = $1",
        consumer.id,
    )
    await broker.maintain()
    assert await broker.lease(consumer.grant).renew()
    assert not await consumer.settle([Done(held)])
    spared = await database.fetchval("SELECT spared FROM aiotaskq_silence")
    assert 0 < spared < 1e11


@pytest.mark.parametrize("odd", ODD)
async def test_a_sign_of_life_in_the_future_hides_no_outage_from_a_renewal(
    broker: PostgresBroker, join: Join, database: Database, odd: float
) -> None:
    first, second = await join(), await join()
    await database.execute(FORGED, 60.0, odd, odd)
    await database.execute(
        "UPDATE aiotaskq_consumers SET beat = beat - 100, lease_until = lease_until - 100"
        " WHERE id = $1 OR id = $2",
        first.id,
        second.id,
    )
    assert await broker.lease(first.grant).renew()
    await broker.maintain()
    assert await broker.lease(second.grant).renew()


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("lease", [60.0, 0.0, -1.0, *ODD])
async def test_a_lease_without_an_end_lapses(
    broker: PostgresBroker, join: Join, database: Database, odd: float, lease: float
) -> None:
    await join()
    await database.execute(FORGED, lease, odd, 0.0)
    number = await database.fetchval("SELECT number FROM aiotaskq_consumers WHERE id = 'forged'")
    await put(database, "held", consumer=str(number), token="1")
    assert (await broker.maintain()).reclaimed == 1
    assert [one.id for one in await broker.consumers()] != ["forged"]
    assert not await database.fetchval(
        "SELECT count(*) FROM aiotaskq_consumers WHERE id = 'forged'"
    )


@pytest.mark.parametrize("seconds", [30.0, 10**6])
async def test_a_clock_that_is_set_back_ends_no_lease_of_the_living(
    broker: PostgresBroker, join: Join, database: Database, seconds: float
) -> None:
    first, second = await join(), await join()
    await database.execute(
        "UPDATE aiotaskq_consumers SET beat = beat + $1, lease_until = lease_until + $1", seconds
    )
    await broker.maintain()
    for consumer in (first, second):
        assert await broker.lease(consumer.grant).renew()
        await broker.maintain()
    assert len(await broker.consumers()) == 2


async def test_a_lease_of_any_length_can_be_given(broker: PostgresBroker) -> None:
    consumer = broker.consumer(["q"], name="w", lease=1e300)
    await consumer.open()
    assert await broker.lease(consumer.grant).renew()
    await broker.maintain()
    assert await broker.lease(consumer.grant).renew()
    await consumer.close()


async def test_a_missing_row_of_silences_is_made_again(
    broker: PostgresBroker, join: Join, database: Database
) -> None:
    await join()
    await database.execute("DELETE FROM aiotaskq_silence")
    await database.execute("UPDATE aiotaskq_consumers SET lease_until = 0")
    await broker.maintain()
    assert await database.fetchval("SELECT count(*) FROM aiotaskq_silence") == 1


async def test_a_step_of_migration_of_another_program_is_left_alone(
    broker: PostgresBroker, database: Database
) -> None:
    await database.execute("INSERT INTO aiotaskq_migrations (number, name) VALUES (999, 'odd')")
    other = broker.clone()
    await other.open()
    await other.close()


async def test_dead_letters_with_odd_columns_are_listed(
    broker: PostgresBroker, database: Database
) -> None:
    await database.execute(
        "INSERT INTO aiotaskq_dead (died_at, crashes, priority, id, queue, reason, details, body)"
        " SELECT d, -1, -1, '', 'q', '', '\\xff', '\\xff'"
        " FROM unnest('{NaN,Infinity,-Infinity,1e300}'::float8[]) AS d"
    )
    letters = await broker.dead("q")
    assert len(letters) == 4
    await broker.maintain(DeadLimits(most=2, age=60.0))
    assert await broker.discard("q", [one.key for one in letters]) == 2


# --- notices ------------------------------------------------------------------------------------

NOTICES = ["garbage", '{"a": 1}', "[1]", '["\\ud800"]', "[" * 7000, '"' + "x" * 7000, "null"]


async def test_a_notice_of_another_program_is_skipped(make: Make, database: Database) -> None:
    backend = await make()
    async with aclosing(backend.subscribe()) as arrivals:  # type: ignore[type-var]  # a generator
        assert await anext(arrivals) == []
        for notice in NOTICES:
            await database.execute("SELECT pg_notify('aiotaskq_results', $1)", notice)
        await backend.store([outcome("a")], None)
        async with asyncio.timeout(PATIENCE):
            while "a" not in (news := await anext(arrivals)):
                assert news == []


class Full:
    """A connection of asyncpg whose server has no room for notices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = True
        self.calls = 0
        fetch = asyncpg.Connection.fetch

        async def failing(connection: Any, query: str, *arguments: Any, **options: Any) -> Any:
            if self.on and "pg_notify" in query:
                self.calls += 1
                raise asyncpg.ProgramLimitExceededError(
                    "too many notifications in the NOTIFY queue"
                )
            return await fetch(connection, query, *arguments, **options)

        monkeypatch.setattr(asyncpg.Connection, "fetch", failing)


async def test_without_room_for_notices_tasks_are_stored_and_results_wait(
    broker: PostgresBroker, join: Join, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, consumer = await make(), await join()
    full = Full(monkeypatch)
    await broker.publish([envelope("a")])  # nobody is woken, and nothing is raised
    [got] = await consumer.fetch(1, 0)
    assert not await consumer.settle([Release(got)])
    assert full.calls
    with pytest.raises(BackendUnavailable, match="no room for notices"):
        await backend.store([outcome("a")], None)
    full.on = False
    assert not await backend.store([outcome("a")], None)
    assert set(await backend.load(["a"])) == {"a"}


async def test_results_need_no_notice_where_there_is_hardly_room(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await make()
    statement = "pg_notification_queue_usage() < 0.9"
    render = backend._pool.names.render
    monkeypatch.setattr(
        backend._pool.names, "render", lambda text: render(text).replace(statement, "false")
    )
    assert not await backend.store([outcome("a")], None)
    assert set(await backend.load(["a"])) == {"a"}


async def test_a_consumer_that_can_receive_no_notices_looks_by_itself(
    broker: PostgresBroker, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> Any:
        raise BrokerUnavailable("too many connections for role")

    monkeypatch.setattr(broker._pool, "listen", refuse)
    consumer = await join()
    fetching = asyncio.create_task(consumer.fetch(1, PATIENCE))
    await until(lambda: asyncio.sleep(0, broker._notifier._told_deaf))
    await broker.publish([envelope("a")])
    assert ids(await fetching) == ["a"]


# --- set-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_driver", [PostgresBroker, PostgresBackend])
async def test_a_schema_that_does_not_exist_is_a_mistake_and_no_outage(
    postgres_url: str, make_driver: type[PostgresBroker | PostgresBackend]
) -> None:
    driver = make_driver(f"{postgres_url}?search_path=nope")
    with pytest.raises(ConfigError, match="search_path"):
        await driver.open()
    await driver.close()


@pytest.mark.parametrize("options", ["", "?statement_cache_size=0"])
async def test_the_isolation_level_of_the_database_is_not_that_of_the_driver(
    postgres_server: PostgresServer, postgres_url: str, options: str
) -> None:
    name = postgres_url.rpartition("/")[2]
    postgres_server.sql(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    broker, backend = (
        PostgresBroker(postgres_url + options),
        PostgresBackend(postgres_url + options),
    )
    level = "SELECT current_setting('transaction_isolation') AS level"
    for driver in (broker, backend):
        await driver.open()
        [row] = await driver._pool.query(level)
        assert row["level"] == "read committed"
    async with (transaction := await backend.begin()).connection.transaction():
        assert await transaction.connection.fetchval(level) == "serializable"
    await transaction.roll_back()
    await broker.close()
    await backend.close()


async def test_a_connection_to_another_database_with_our_tables_is_refused(
    broker: PostgresBroker, postgres_server: PostgresServer, database: Database
) -> None:
    name = postgres_server.create_database()
    other = PostgresBroker(postgres_server.url(name))
    await other.open()
    await other.close()
    foreign = await asyncpg.connect(postgres_server.url(name))
    try:
        async with foreign.transaction():
            with pytest.raises(ConfigError, match="other tables"):
                await broker.publish_in(foreign, [envelope("a")])
        await foreign.execute("DROP TABLE aiotaskq_messages")
        async with foreign.transaction():
            with pytest.raises(ConfigError, match="no table"):
                await broker.publish_in(foreign, [envelope("a")])
    finally:
        await foreign.close()
        postgres_server.drop_database(name)
    async with database.transaction():
        await broker.publish_in(database, [envelope("a")])
        with pytest.raises(EncodeError):  # before the transaction is spoilt
            await broker.publish_in(database, [envelope("b\0")])
    assert (await broker.depth())["q"].ready == 1


async def test_the_first_call_after_connections_were_dropped_without_a_word_succeeds(
    postgres_server: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_QUIET", 0.0)
    async with quiet_proxy(postgres_server.host, postgres_server.port) as proxy:
        url = postgres_url.replace(f":{postgres_server.port}/", f":{proxy.port}/")
        broker = PostgresBroker(url, timeout=60.0)
        await broker.open()
        await broker.publish([envelope("a")])
        proxy.swallow()
        await broker.publish([envelope("b")])
        assert (await broker.depth())["q"].ready == 2
        await broker.close()
