"""Redis over TLS and with users: connections, refusals, and passwords in no text."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import redis

from aiotaskq import TaskQueue
from aiotaskq.contract.records import StoredSchedule
from aiotaskq.contract.settlement import Again, Dead, Done
from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.drivers.redis.cluster import ClusterBroker
from aiotaskq.drivers.redis.permissions import ROLES
from aiotaskq.errors import BrokerUnavailable, ConfigError
from tests.drivers.redis.tools import envelope, outcome
from tests.servers import Certificates, RedisCluster, RedisServer, Watchdog, free_port
from tests.servers.sentinel import SentinelServer

USER, PASSWORD = "worker", "s3cret/p@ss"
QUOTED = "s3cret%2Fp%40ss"
RULES = " ".join(ROLES["all"].rules())


# asyncio leaves a transport unclosed where a handshake fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def nothing_unclosed_is_left_to_others() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def secured(port: int, certificates: Certificates) -> dict[str, str]:
    """Return the options of a server that speaks TLS on one more port."""
    return {
        "tls-port": str(port),
        "tls-cert-file": str(certificates.certificate),
        "tls-key-file": str(certificates.key),
        "tls-ca-cert-file": str(certificates.authority),
        "tls-auth-clients": "no",
    }


class SecureRedis(RedisServer):
    """A Redis server that speaks TLS on one more port, and knows a user that may do little."""

    def __init__(self, watchdog: Watchdog, certificates: Certificates) -> None:
        self.secure_port = 0
        super().__init__(watchdog)
        acl = self.folder / "users.acl"
        acl.write_text(f"user default on nopass ~* &* +@all\nuser {USER} on >{PASSWORD} {RULES}\n")
        self.secure_port = free_port()
        self._options = secured(self.secure_port, certificates) | {"aclfile": str(acl)}

    def secure_url(self, authority: object, password: str = QUOTED, host: str = "") -> str:
        place = f"{host or self.host}:{self.secure_port}"
        return f"rediss://{USER}:{password}@{place}/0?ssl_ca_certs={authority}"


@pytest.fixture(scope="module")
def secure(watchdog: Watchdog, certificates: Certificates) -> Iterator[SecureRedis]:
    server = SecureRedis(watchdog, certificates)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def url(secure: SecureRedis, certificates: Certificates) -> str:
    secure.flush()
    return secure.secure_url(certificates.authority)


@pytest.fixture
async def broker(url: str) -> AsyncIterator[RedisBroker]:
    broker = RedisBroker(url)
    await broker.open()
    yield broker
    await broker.close()


async def test_a_user_with_the_least_rules_does_all_over_tls(broker: RedisBroker, url: str) -> None:
    batch = [envelope(one, unique=one == "u", delay=0.0) for one in "abcdu"]
    assert not await broker.publish(batch, call_id="c")
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    lease = broker.lease(consumer.grant)
    assert await lease.renew()
    a, b, c, d, u = await consumer.fetch(10, 1.0)
    assert not await consumer.fetch(1, 0.05)  # which waits
    assert not await consumer.settle([Again(b, envelope("b", delay=60.0)), Dead(c, "bad"), Done(d)])
    assert not await consumer.settle([Done(a), Done(u)])
    await consumer.news()
    await broker.maintain()
    await broker.depth()
    await broker.consumers()
    await broker.cancel(["x"], running=False)
    [letter] = await broker.dead("q")
    await broker.revive("q", [(letter.key, envelope("c"))])
    await broker.discard("q", [letter.key])
    store = broker.schedules()
    one = StoredSchedule(id="s", body=b"", due_at=1.0, revision="1")
    assert await store.compare_and_swap("s", None, one)
    assert (await store.due(1)).schedules == await store.load() == [one]
    assert await broker.purge("q") == 2
    assert await lease.end("killed") == 0
    await lease.close()
    await consumer.close()


async def test_results_are_pushed_over_tls(url: str) -> None:
    backend = RedisBackend(url)
    await backend.open()
    outcomes = backend.subscribe()
    assert await anext(outcomes) == []
    assert not await backend.store([outcome("a")], 60.0)
    assert len(await anext(outcomes)) == 1
    assert list(await backend.load(["a"])) == ["a"]
    assert await backend.forget(["a"]) == 1
    await outcomes.aclose()
    await backend.close()


async def test_keys_of_another_prefix_are_out_of_reach(secure: SecureRedis, url: str) -> None:
    broker = RedisBroker(url, prefix="theirs")
    await broker.open()
    with pytest.raises(BrokerUnavailable, match=r"(?i)key|permission"):
        await broker.publish([envelope("a")])
    await broker.close()
    with redis.Redis(host=secure.host, port=secure.port) as control:
        assert not control.keys("theirs*")


async def test_a_certificate_of_an_unknown_authority_is_refused(
    secure: SecureRedis, certificates: Certificates
) -> None:
    broker = RedisBroker(secure.secure_url(certificates.stranger))
    with pytest.raises(BrokerUnavailable, match=r"(?i)certificate"):
        await broker.open()


async def test_a_certificate_for_another_host_is_refused_unless_told_otherwise(
    secure: SecureRedis, certificates: Certificates
) -> None:
    url = secure.secure_url(certificates.authority, host="127.0.0.2")
    with redis.Redis(host=secure.host, port=secure.port) as control:
        control.config_set("bind", "127.0.0.1 127.0.0.2")
    broker = RedisBroker(url)
    with pytest.raises(BrokerUnavailable, match=r"(?i)certificate"):
        await broker.open()
    lenient = RedisBroker(f"{url}&ssl_check_hostname=false")
    await lenient.open()
    await lenient.close()


@pytest.mark.parametrize("password", ["wr0ng", ""])
async def test_a_wrong_password_is_refused_and_shown_nowhere(
    secure: SecureRedis,
    certificates: Certificates,
    password: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    broker = RedisBroker(secure.secure_url(certificates.authority, password))
    with pytest.raises(ConfigError, match="refuses the connection") as caught:
        await broker.open()
    shown = f"{caught.value!r} {broker.url} {broker!r} {caplog.text}"
    assert not password or password not in shown


@pytest.mark.parametrize(
    "url",
    [
        "rediss://u:s3cret@h:1/0",
        "redis+sentinel://u:s3cret@h:1,h:2/0?service=x&sentinel_password=s3cret",
        "rediss+sentinel://:s3cret@h:1,h:2",
        "redis+cluster://u:s3cret@h:1,h:2",
        "rediss+cluster://u:s3cret@h:1,h:2?shards=3&ssl_password=s3cret",
    ],
)
async def test_passwords_are_masked_wherever_a_url_is_shown(url: str) -> None:
    app = TaskQueue(broker=url)
    broker, backend = app.drivers()
    assert backend is not None
    shown = f"{broker.url} {backend.url} {broker!r} {backend!r} {app!r}"
    assert "s3cret" not in shown
    assert "***" in broker.url


async def test_the_error_of_a_cluster_that_refuses_has_no_password(
    secure: SecureRedis, certificates: Certificates
) -> None:
    url = secure.secure_url(certificates.authority, "wr0ng").replace("rediss:", "rediss+cluster:")
    with pytest.raises(ConfigError, match="refuses the connection") as caught:
        await ClusterBroker(url.replace("/0?", "?")).open()
    assert "wr0ng" not in repr(caught.value)


async def test_sentinels_over_tls_have_users_and_passwords_of_their_own(
    secure: SecureRedis, url: str, watchdog: Watchdog, certificates: Certificates
) -> None:
    port, other = free_port(), "0ther/p@ss"
    options = secured(port, certificates) | {
        "tls-replication": "yes",  # or it asks the master without TLS
        "user": f"watcher on >{other} -@all +@connection +sentinel|get-master-addr-by-name",
    }
    sentinel = SentinelServer(
        watchdog, secure.secure_port, 1, [f"{name} {value}" for name, value in options.items()]
    )
    try:
        sentinel.start()
        url = url.replace("rediss:", "rediss+sentinel:").replace(
            f":{secure.secure_port}", f":{port}"
        )
        account = "sentinel_username=watcher&sentinel_password"
        refused = RedisBroker(f"{url}&{account}=wr0ng")
        with pytest.raises(ConfigError, match="refuses the connection") as caught:
            await refused.open()
        assert "wr0ng" not in f"{caught.value!r} {refused.url}"
        assert PASSWORD not in repr(caught.value)
        broker = RedisBroker(f"{url}&{account}={quote(other, safe='')}")
        await broker.open()
        assert not await broker.publish([envelope("a")])
        assert other not in broker.url
        await broker.close()
        stranger = url.replace(str(certificates.authority), str(certificates.stranger))
        with pytest.raises(BrokerUnavailable, match=r"(?i)certificate"):
            await RedisBroker(f"{stranger}&{account}={quote(other, safe='')}").open()
    finally:
        sentinel.close()
    with redis.Redis(host=secure.host, port=secure.port) as control:
        assert control.llen("aiotaskq:{q}:ready") == 1


async def test_a_cluster_over_tls_serves_a_user_who_may_see_the_slots(
    watchdog: Watchdog, certificates: Certificates
) -> None:
    port = free_port()
    # Without the other option it tells the ports without TLS.
    options = secured(port, certificates) | {"tls-cluster": "yes"}
    cluster = RedisCluster(watchdog, masters=1, replicas=False, options=options)
    try:
        cluster.start()
        [node] = cluster.nodes
        node.command(f"ACL SETUSER {USER} on >{PASSWORD} {RULES} +cluster|slots")
        place = f"{USER}:{QUOTED}@{node.host}:{port}"
        app = TaskQueue(
            broker=f"rediss+cluster://{place}?ssl_ca_certs={certificates.authority}&shards=3"
        )
        broker, backend = app.drivers()
        assert backend is not None
        await broker.open()
        await backend.open()
        assert not await broker.publish([envelope("a", unique=True), envelope("b")])
        consumer = broker.consumer(["q"], name="w", lease=60.0)
        await consumer.open()
        got = [*await consumer.fetch(2, 1.0), *await consumer.fetch(2, 1.0)]
        assert sorted(one.id for one in got) == ["a", "b"]
        assert not await backend.store([outcome("a")], 60.0)
        assert not await consumer.settle([Done(one) for one in got])
        await broker.maintain()
        await consumer.close()
        await backend.close()
        await broker.close()
    finally:
        cluster.close()


def test_the_how_to_names_these_rules() -> None:
    page = Path(__file__).parents[3] / "docs" / "how-to" / "redis.md"
    assert f"ACL SETUSER all on >password {RULES}\n" in page.read_text(encoding="utf-8")
