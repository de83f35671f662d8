"""Fixtures for all tests: servers, and the check that a test leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NoReturn, Protocol, TypeVar

import psutil
import pytest
from blockbuster import BlockBuster
from hypothesis import HealthCheck, settings
from xdist.remote import Producer  # type: ignore[import-untyped]  # it has no types
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # likewise

import aiotaskq.worker  # noqa: F401 - now, since its first import reads files, in a loop as well
from aiotaskq.forks import STOP_SIGNALS
from tests.process_tree import child_pids
from tests.servers import (
    Certificates,
    PgBouncer,
    PostgresServer,
    RabbitServer,
    RedisCluster,
    RedisServer,
    SentinelSet,
    ServerFailed,
    ServerMissing,
    Watchdog,
)

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would each program
# that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine may stop any example for a while: there is no deadline, and slow is not wrong.
# `make faults` tries more examples.
settings.register_profile(
    "aiotaskq",
    max_examples=200 if os.environ.get("AIOTASKQ_TESTS_FAULTS") == "long" else 40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("aiotaskq")

SERVER_FIXTURES = frozenset(
    {
        "redis_server",
        "redis_cluster",
        "redis_sentinel",
        "postgres_server",
        "pgbouncer",
        "rabbit_server",
    }
)
# Each process of a test run has servers of its own. Servers that take long to start run in one
# process only: that of all tests with one of these words in their names or their paths.
HEAVY = {
    "rabbit": "rabbitmq",
    "pgbouncer": "pgbouncer",
    "cluster": "redis",
    "sentinel": "redis",
    "failover": "redis",
}
GRACE = 30.0  # seconds for threads, processes and tasks to end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a server, for `make test-fast`."""
    for item in items:
        if isinstance(item, pytest.Function) and not SERVER_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker("server")


class Spread(LoadScopeScheduling):  # type: ignore[misc]  # likewise
    """A scheduler that spreads tests one by one, but keeps those of `HEAVY` together."""

    def _split_scope(self, nodeid: str) -> str:
        return next((group for word, group in HEAVY.items() if word in nodeid), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Spread:
    """Spread the tests over processes."""
    return Spread(config, log)


# --- servers ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def watchdog() -> Iterator[Watchdog]:
    """The watchdog, which stops the servers if the test run is killed."""
    dog = Watchdog()
    _expected.append(dog)
    yield dog
    dog.close()


@pytest.fixture(scope="session")
def redis_server(watchdog: Watchdog) -> Iterator[RedisServer]:
    """A Redis server of the test run; tests may kill and restart it."""
    yield from _run(lambda: RedisServer(watchdog))


@pytest.fixture(scope="session")
def postgres_server(watchdog: Watchdog) -> Iterator[PostgresServer]:
    """A PostgreSQL server of the test run; tests may kill and restart it."""
    yield from _run(lambda: PostgresServer(watchdog))


@pytest.fixture(scope="session")
def pgbouncer(watchdog: Watchdog, postgres_server: PostgresServer) -> Iterator[PgBouncer]:
    """A PgBouncer in transaction mode in front of the PostgreSQL server."""
    yield from _run(lambda: PgBouncer(watchdog, postgres_server))


@pytest.fixture(scope="session")
def rabbit_server(watchdog: Watchdog, certificates: Certificates) -> Iterator[RabbitServer]:
    """A RabbitMQ server of the test run; tests may kill and restart it."""
    yield from _run(lambda: RabbitServer(watchdog, certificates))


@pytest.fixture(scope="session")
def redis_cluster(watchdog: Watchdog) -> Iterator[RedisCluster]:
    """A Redis cluster of six nodes; tests may kill and restart them."""
    yield from _run(lambda: RedisCluster(watchdog))


@pytest.fixture(scope="session")
def redis_sentinel(watchdog: Watchdog) -> Iterator[SentinelSet]:
    """Three Redis servers and three sentinels; tests may kill and restart them."""
    yield from _run(lambda: SentinelSet(watchdog))


class _Startable(Protocol):
    """A server or a set of servers, as `_run` needs it."""

    def start(self) -> None: ...

    def close(self) -> None: ...


Servers = TypeVar("Servers", bound=_Startable)


def _run(make: Callable[[], Servers]) -> Iterator[Servers]:
    """Create and start servers, and close them at the end, also if the start failed."""
    servers = _started(make)
    try:
        yield servers
    finally:
        servers.close()


def _started(make: Callable[[], Servers]) -> Servers:
    """Return running servers; try again where a port that was free was taken meanwhile."""
    left = 3
    while True:
        try:
            servers = make()
        except ServerMissing as missing:
            _without(missing)
        try:
            servers.start()
        except BaseException as error:
            servers.close()
            left -= 1
            if not left or not isinstance(error, ServerFailed):
                raise
        else:
            return servers


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority, and a certificate that it signed for the servers."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Database 0 of a running Redis server, empty, as all its other databases are."""
    redis_server.start()
    redis_server.flush()
    return redis_server.url(0)


@pytest.fixture
def redis_cluster_url(redis_cluster: RedisCluster) -> str:
    """A running Redis cluster, empty."""
    redis_cluster.start()
    redis_cluster.flush()
    return redis_cluster.url


@pytest.fixture
def redis_sentinel_url(redis_sentinel: SentinelSet) -> str:
    """A running Redis master with replicas and sentinels, empty."""
    redis_sentinel.start()
    redis_sentinel.flush()
    return redis_sentinel.url


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database of a running PostgreSQL server, dropped afterwards."""
    postgres_server.start()
    name = postgres_server.create_database()
    yield postgres_server.url(name)
    postgres_server.start()  # the test may have stopped it
    postgres_server.drop_database(name)


def _without(missing: ServerMissing) -> NoReturn:
    if os.environ.get("AIOTASKQ_TESTS_SKIP_SERVERS") == "1" and not os.environ.get("CI"):
        pytest.skip(f"{missing} is not installed, and AIOTASKQ_TESTS_SKIP_SERVERS is set")
    pytest.fail(
        f"{missing} is not installed: run scripts/install-servers, or `make test`, which does",
        pytrace=False,
    )


# --- nothing outlives its test ------------------------------------------------------------------

_expected: list[Watchdog] = []
# Helpers of the standard library that start when first needed and then stay.
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@pytest.fixture(autouse=True)
def nothing_outlives(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread or a child process behind."""
    if request.node.get_closest_marker("may_leave") is not None:
        yield
        return
    threads = set(threading.enumerate())
    processes = set(_children())
    yield
    end = time.monotonic() + GRACE
    while True:
        left = [str(thread) for thread in set(threading.enumerate()) - threads if thread.is_alive()]
        left += [_describe(child) for child in set(_children()) - processes]
        if not left:
            return
        if time.monotonic() > end:
            pytest.fail("outlived its test: " + "; ".join(left), pytrace=False)
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    """Fail a test that changes how this process, or one that it starts, takes stop signals."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == before


@pytest.fixture(autouse=True)
def no_task_outlives(request: pytest.FixtureRequest, nothing_outlives: None) -> None:
    """Fail a test that leaves an asyncio task behind.

    Set up after `nothing_outlives`, so that the event loop, with the threads of its executor, is
    closed before that fixture looks for threads.
    """
    if request.node.get_closest_marker("may_leave") is None and inspect.iscoroutinefunction(
        getattr(request, "function", None)
    ):
        request.getfixturevalue("tasks_of_the_test")


@pytest.fixture
async def tasks_of_the_test() -> AsyncIterator[None]:
    """Look for tasks on the event loop of a test; asked for by `no_task_outlives`."""
    before = asyncio.all_tasks()
    yield
    end = time.monotonic() + GRACE
    while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
        if time.monotonic() > end:
            pytest.fail(f"outlived its test: {left}", pytrace=False)
        await asyncio.sleep(0.001)


def _children() -> list[psutil.Process]:
    known = {pid for dog in _expected for pid in dog.pids}
    found = []
    for pid in child_pids(os.getpid()) - known:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return [one for one in found if not any(helper in _describe(one) for helper in _HELPERS)]


def _describe(child: psutil.Process) -> str:
    try:
        return f"process {child.pid} {' '.join(child.cmdline())}"
    except psutil.Error:
        return f"process {child.pid}, ended"


# --- nothing blocks the event loop --------------------------------------------------------------


@pytest.fixture(scope="session")
def _blocking() -> BlockBuster:
    import aiotaskq.testing

    # The harnesses of the suites may block: they stop servers.
    blocking = BlockBuster(scanned_modules=["aiotaskq"], excluded_modules=[aiotaskq.testing])
    for function in blocking.functions.values():
        # asyncpg reads ~/.pgpass and certificates when it connects, which no option prevents.
        function.can_block_in("asyncpg/connect_utils.py", "_parse_connect_arguments")
        # The metadata of installed distributions are read once for a scheme, as an import is.
        function.can_block_in(
            "aiotaskq/drivers/entry_points.py", {"find_driver", "claimed_schemes"}
        )
    return blocking


@pytest.fixture(autouse=True)
def nothing_blocks(request: pytest.FixtureRequest, _blocking: BlockBuster) -> Iterator[None]:
    """Fail a test in which aiotaskq blocks the event loop."""
    if request.node.get_closest_marker("may_block") is not None:
        yield
        return
    _blocking.activate()
    try:
        yield
    finally:
        _blocking.deactivate()
