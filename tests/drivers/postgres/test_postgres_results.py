"""What only results in PostgreSQL have."""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec
import pytest
from msgspec import UNSET, Raw

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, RemoteError, TaskStatus
from aiotaskq.drivers.postgres import PostgresBackend, results, subscription
from aiotaskq.drivers.postgres.url import parse_url
from aiotaskq.errors import BackendUnavailable, ConfigError, DecodeError
from tests.servers import PostgresServer

PATIENCE = 30.0
Make = Callable[..., Awaitable[PostgresBackend]]


@pytest.fixture
async def make(postgres_url: str) -> AsyncIterator[Make]:
    """Make open backends, on the database of the test unless another URL is given."""
    made: list[PostgresBackend] = []

    async def make(url: str = postgres_url, **settings: Any) -> PostgresBackend:
        backend = PostgresBackend(url, **settings)
        made.append(backend)
        await backend.open()
        return backend

    yield make
    for backend in made:
        await backend.close()


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection beside the driver's own."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


def outcome(task_id: str, result: bytes = b"1", **fields: Any) -> Outcome:
    fields = {"status": TaskStatus.SUCCESS, **fields}
    return Outcome(task_id=task_id, result=Raw(result), **fields)


HISTORY = (
    Attempt(number=1, at=1.5, worker="w1", error="ValueError: grüße", traceback="Traceback\n"),
    Attempt(number=2, at=2.5, worker="w2", error="OSError: away"),
)

# The table as the first release made it.
EARLIER_TABLE = """
CREATE TABLE aiotaskq_results (
    task_id text PRIMARY KEY, status text NOT NULL, result jsonb, date_done timestamptz,
    traceback text, name text, args jsonb, kwargs jsonb, worker text, retries integer, queue text,
    execution_time double precision, children jsonb, expires_at timestamptz
)
"""


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            await asyncio.sleep(0.01)


# --- URLs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [
        "postgresql",
        "postgres",
        "db+postgresql",
        "db+postgresql+psycopg2",
        "db+postgresql+psycopg",
        "db+postgresql+asyncpg",
        "postgresql+asyncpg",
    ],
)
async def test_every_form_of_url_is_served(make: Make, postgres_url: str, scheme: str) -> None:
    backend = await make(f"{scheme}{postgres_url.removeprefix('postgresql')}")
    await backend.store([outcome("a")], None)
    assert set(await backend.load(["a"])) == {"a"}
    assert backend.url == postgres_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u:sec@ret/x:@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql:///d?host=/run/x&password=secret", "postgresql:///d?host=/run/x&password=***"),
        ("db+postgresql+psycopg2://u:secret@/d", "postgresql://u:***@/d"),
        (
            "postgres://u:secret@a:1,b:2/d?sslmode=require",
            "postgresql://u:***@a:1,b:2/d?sslmode=require",
        ),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    backend = PostgresBackend(url)
    assert backend.url == shown
    assert "secret" not in repr(backend)


def test_user_and_password_are_unquoted() -> None:
    arguments = parse_url("postgresql://u%40x:p%2F%3A@h/d").arguments
    assert (arguments["user"], arguments["password"]) == ("u@x", "p/:")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("postgresql://u:secret@h/d?prepared_statement_cache_size=0", "statement_cache_size=0"),
        ("postgresql://u:secret@h/d?ssl=true", "sslmode=require"),
        ("postgresql://u:secret@h/d?pool_size=3&max_overflow=1", "max_overflow, pool_size"),
        ("postgresql://u:secret@h/d?pool_size=3", "PostgresBroker or PostgresBackend"),
        ("postgresql://u:secret@h/d?channel_binding=require", "channel_binding"),
        ("postgresql://u:secret@h/d?statement_cache_size=secretly", "statement_cache_size"),
        ("postgresql+odd://u:secret@h/d", "'odd'"),
        ("postgresql://u:secret@h/d?x", "name=value"),
        ("mysql://u:secret@h/d", "postgresql://"),
    ],
)
def test_a_url_that_cannot_be_served_is_refused(url: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PostgresBackend(url)
    assert named in str(caught.value)
    assert "secret@" not in "".join(traceback.format_exception(caught.value))


async def test_settings_in_the_url_reach_the_server(make: Make, postgres_url: str) -> None:
    backend = await make(
        f"{postgres_url}?application_name=mine&statement_cache_size=0&connect_timeout=9"
    )
    rows = await backend._pool.fetch("SHOW application_name")
    assert rows[0][0] == "mine"
    for _ in range(3):
        await backend.store([outcome("a")], 60)
    assert set(await backend.load(["a"])) == {"a"}


async def test_a_setting_that_the_server_does_not_know_is_named(
    make: Make, postgres_url: str
) -> None:
    with pytest.raises(ConfigError, match="no_such_setting"):
        await make(f"{postgres_url}?no_such_setting=1")


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


async def test_a_wrong_password_is_a_matter_of_configuration(
    make: Make, postgres_server: PostgresServer
) -> None:
    wrong = "not" + postgres_server.guarded_password
    with pytest.raises(ConfigError, match="password") as caught:
        await make(postgres_server.guarded_url(password=wrong))
    assert wrong not in "".join(traceback.format_exception(caught.value))


async def test_a_missing_database_is_a_matter_of_configuration(
    make: Make, postgres_server: PostgresServer
) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*create"):
        await make(postgres_server.url("nowhere"))
    subscriber = PostgresBackend(postgres_server.url("nowhere")).subscribe()
    with pytest.raises(ConfigError):
        await anext(subscriber)


async def test_no_free_connection_is_no_matter_of_configuration(
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


async def test_what_is_out_of_date_is_deleted_in_pieces(
    make: Make, database: asyncpg.Connection[asyncpg.Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_SWEEP_ROWS", 100)
    backend = await make()
    await backend.store([outcome(f"{n}") for n in range(250)], 10)
    await backend.store([outcome("stays"), outcome("stays too")], None)
    backend._time_shift = 11.0
    backend._swept_at = -math.inf
    left = []
    for n in range(4):
        await backend.store([outcome(f"new {n}")], 1000)
        left.append(await database.fetchval("SELECT count(*) FROM aiotaskq_results"))
    assert left == [153, 54, 5, 6]  # pieces of a hundred, then a minute of rest
    assert len(await backend.load(["stays", "stays too"])) == 2


async def test_a_row_that_somebody_else_wrote_is_no_outcome(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = await make()
    await database.execute("INSERT INTO aiotaskq_results (task_id, status) VALUES ('a', 'odd')")
    with pytest.raises(DecodeError, match="a"):
        await backend.load(["a"])


# --- what PostgreSQL cannot keep ----------------------------------------------------------------

IMPOSSIBLE = {
    "NUL": b'{"a":["b\\u0000"]}',
    "lone surrogate": b'"\\ud800"',
    "huge number": b"1e200000",
    "deep": b"[" * 20_000 + b"]" * 20_000,
    "not JSON": b"\x81\xff",
    "not UTF-8": b'"\xff"',
    "empty": b"",
}


@pytest.mark.parametrize("result", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
async def test_a_result_that_cannot_be_kept_is_a_failure_that_says_so(
    make: Make, result: bytes
) -> None:
    backend = await make()
    batch = [outcome(f"{n}", str(n).encode()) for n in range(700)]
    batch[123] = outcome("123", result, name="tasks.odd")
    async with heard(backend) as arrived:
        assert not await backend.store(batch, None)
        await until_heard(arrived, {one.task_id for one in batch})
    loaded = dict(await backend.load([one.task_id for one in batch]))
    odd = loaded.pop("123")
    assert {one: bytes(other.result) for one, other in loaded.items()} == {
        f"{n}": str(n).encode() for n in range(700) if n != 123
    }
    assert (odd.status, odd.name) == (TaskStatus.FAILURE, "tasks.odd")
    error = msgspec.json.decode(odd.result, type=RemoteError)
    assert error.exc_type == "EncodeError"
    assert "PostgreSQL cannot keep the result" in error.exc_message[0]
    assert list(await backend.store([outcome("123")], None)) == ["123"]


async def test_nul_in_an_error_is_shown(make: Make) -> None:
    backend = await make()
    error = RemoteError("ValueError", ["embedded \0 byte", 3], "builtins")
    failed = outcome(
        "a",
        msgspec.json.encode(error),
        status=TaskStatus.FAILURE,
        traceback="line\0\udc80",
        args=Raw(b'["\\u0000"]'),
        worker="w",
    )
    await backend.store([failed], None)
    loaded = (await backend.load(["a"]))["a"]
    assert loaded.status is TaskStatus.FAILURE
    assert msgspec.json.decode(loaded.result, type=RemoteError) == RemoteError(
        "ValueError", ["embedded \\x00 byte", 3], "builtins"
    )
    assert loaded.traceback == "line\\x00\\udc80"
    assert (loaded.args, loaded.worker) == (UNSET, "w")


async def test_a_history_that_cannot_be_kept_is_shown(make: Make) -> None:
    backend = await make()
    odd = Attempt(number=1, at=1.0, worker="w\0", error="a\0b", traceback="c\udc80")
    await backend.store([outcome("a", history=(odd, *HISTORY)), outcome("b")], None)
    loaded = await backend.load(["a", "b"])
    assert loaded["a"].status is TaskStatus.SUCCESS
    shown = Attempt(number=1, at=1.0, worker="w\\x00", error="a\\x00b", traceback="c\\udc80")
    assert loaded["a"].history == (shown, *HISTORY)
    assert loaded["b"].status is TaskStatus.SUCCESS


async def test_arguments_that_cannot_be_kept_do_not_fail_the_task(make: Make) -> None:
    backend = await make()
    await backend.store(
        [outcome("a", b'"fine"', args=Raw(b'["\\u0000"]'), kwargs=Raw(b"{}"))], None
    )
    loaded = (await backend.load(["a"]))["a"]
    assert (loaded.status, bytes(loaded.result)) == (TaskStatus.SUCCESS, b'"fine"')
    assert loaded.args is UNSET


@pytest.mark.parametrize("task_id", ["a\0b", "\ud800"])
async def test_an_id_that_cannot_be_kept_harms_no_other(make: Make, task_id: str) -> None:
    backend = await make()
    await backend.store([outcome("a"), outcome(task_id), outcome("b")], None)
    assert set(await backend.load(["a", task_id, "b"])) == {"a", "b"}
    assert await backend.forget(["a", task_id]) == 1


async def test_an_id_too_long_to_be_told_is_found_by_looking(make: Make) -> None:
    backend = await make()
    long = "x" * 1500
    async with heard(backend) as arrived:
        await backend.store([outcome(long), outcome("short")], None)
        await until_heard(arrived, {""})
    assert set(await backend.load([long, "short"])) == {long, "short"}


async def test_ids_of_odd_lengths_fit_their_notices(make: Make) -> None:
    backend = await make()
    ids = {f"{n}" + '"\\é' * (n % 290) for n in range(600)}
    async with heard(backend) as arrived:
        await backend.store([outcome(one) for one in ids], None)
        # Some are too long: for those there is an empty item.
        await until_heard(arrived, {one for one in ids if len(msgspec.json.encode(one)) < 800})


@asynccontextmanager
async def heard(backend: PostgresBackend) -> AsyncIterator[set[str]]:
    """Collect ids that arrive; the empty string stands for an empty item after the first."""
    found: set[str] = set()
    ready = asyncio.Event()

    async def listen() -> None:
        async for ids in backend.subscribe():
            if ready.is_set():
                found.update(ids or [""])
            ready.set()

    task = asyncio.create_task(listen())
    await asyncio.wait_for(ready.wait(), PATIENCE)
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_heard(found: set[str], wanted: set[str]) -> None:
    async def all_there() -> bool:
        return wanted <= found

    await until(all_there)


# --- connections --------------------------------------------------------------------------------


async def test_batches_that_share_ids_do_not_wait_for_each_other(make: Make) -> None:
    backends = [await make() for _ in range(4)]
    for round_ in range(10):
        ids = [f"{round_}.{n}" for n in range(200)]
        refused = await asyncio.gather(
            *(
                one.store([outcome(task_id) for task_id in ids[:: 1 if n % 2 else -1]], None)
                for n, one in enumerate(backends)
            )
        )
        assert sum(map(len, refused)) == 3 * len(ids)


async def test_a_restart_between_two_calls_goes_unnoticed(
    make: Make, postgres_server: PostgresServer
) -> None:
    backend = await make()
    await asyncio.gather(*(backend.store([outcome(f"{n}")], None) for n in range(10)))
    for restart in (postgres_server.restart, postgres_server.kill):
        # Blocks the loop, so that the driver cannot have seen its connections end.
        restart()
        postgres_server.start()
        assert len(await backend.load([f"{n}" for n in range(10)])) == 10


async def test_a_cancelled_call_frees_its_connection(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = await make(pool_size=1)
    await backend.store([outcome("a", status=TaskStatus.STARTED)], None)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    transaction = database.transaction()
    await transaction.start()
    await database.execute("SELECT FROM aiotaskq_results WHERE task_id = 'a' FOR UPDATE")
    store = asyncio.create_task(backend.store([outcome("a")], None))
    await until(lambda: database.fetchval(waiting))
    store.cancel()
    with pytest.raises(asyncio.CancelledError):
        await store
    assert set(await backend.load(["a"])) == {"a"}
    await transaction.rollback()


async def test_a_call_has_a_deadline(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = await make(timeout=0.5)
    await backend.store([outcome("a", status=TaskStatus.STARTED)], None)
    async with database.transaction():
        await database.execute("SELECT FROM aiotaskq_results WHERE task_id = 'a' FOR UPDATE")
        with pytest.raises(BackendUnavailable):
            await backend.store([outcome("a")], None)
    assert not await backend.store([outcome("b")], None)


async def test_a_subscriber_whose_connection_is_ended_subscribes_again(
    make: Make, database: asyncpg.Connection[asyncpg.Record]
) -> None:
    backend = await make()
    end = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query ILIKE 'LISTEN%'"
    )
    async with heard(backend) as arrived:
        assert await database.fetchval(end) == 1
        await until_heard(arrived, {""})
        await backend.store([outcome("a")], None)
        await until_heard(arrived, {"a"})


class Wire:
    """A proxy whose connections can go dead without being closed, as a firewall does it."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        yield listener.sockets[0].getsockname()[1]
        listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def freeze(self) -> None:
        """Let nothing through on the connections that are there; new ones are fine."""
        self._flowing.clear()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._server.host, self._server.port)
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._pump(source, sink, self._flowing))
            self._tasks.add(task)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, flowing: asyncio.Event
    ) -> None:
        try:
            while data := await source.read(65_536):
                await flowing.wait()
                sink.write(data)
        except ConnectionError:
            pass  # the other side ended it, which ends this side too
        finally:
            sink.close()


@pytest.fixture
async def wire(postgres_server: PostgresServer) -> AsyncIterator[tuple[Wire, int]]:
    wire = Wire(postgres_server)
    async with wire.open() as port:
        yield wire, port


async def test_a_connection_that_went_dead_is_noticed(
    make: Make,
    wire: tuple[Wire, int],
    postgres_server: PostgresServer,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subscription, "_PING_EVERY", 0.2)
    monkeypatch.setattr(subscription, "_PING_TIMEOUT", 1.0)
    between, port = wire
    backend = await make(postgres_url.replace(str(postgres_server.port), str(port)), timeout=1.0)
    other = await make()
    await backend.store([outcome("before")], None)
    async with heard(backend) as arrived:
        await other.store([outcome("first")], None)
        await until_heard(arrived, {"first"})
        between.freeze()
        with pytest.raises(BackendUnavailable):
            await backend.load(["before"])
        await until_heard(arrived, {""})
        await other.store([outcome("second")], None)
        await until_heard(arrived, {"second"})
    assert set(await backend.load(["before"])) == {"before"}


async def test_closing_does_not_wait_for_a_dead_connection(
    make: Make, wire: tuple[Wire, int], postgres_server: PostgresServer, postgres_url: str
) -> None:
    between, port = wire
    backend = await make(postgres_url.replace(str(postgres_server.port), str(port)), timeout=20.0)
    await backend.store([outcome("a")], None)
    between.freeze()
    call = asyncio.create_task(backend.load(["a"]))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(15.0):
        await backend.close()
        with pytest.raises(BackendUnavailable):
            await call
