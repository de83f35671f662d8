"""Failover under load, behind Sentinel and in a cluster, and moves between shards."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import pytest

from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Depth, StoredSchedule
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.redis import RedisBroker, scripts
from aiotaskq.drivers.redis.cluster import ClusterBackend, ClusterBroker
from aiotaskq.drivers.redis.cluster.consumer import ClusterConsumer
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.errors import BackendUnavailable, BrokerUnavailable, ConfigError
from tests.drivers.redis.tools import PATIENCE, envelope, insist, outcome
from tests.servers import RedisCluster, RedisServer, SentinelSet

Servers: TypeAlias = SentinelSet | RedisCluster
REPLICATED = "wait_replicas=1&wait_timeout=2"

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(params=["sentinel", "cluster"])
def servers(request: pytest.FixtureRequest) -> Servers:
    request.getfixturevalue(f"redis_{request.param}_url")
    servers: Servers = request.getfixturevalue(f"redis_{request.param}")
    return servers


@pytest.fixture
async def broker(servers: Servers) -> AsyncIterator[Broker]:
    """One whose messages count as stored when a replica has them."""
    broker: Broker
    if isinstance(servers, SentinelSet):
        broker = RedisBroker(f"{servers.url}&{REPLICATED}")
    else:
        broker = ClusterBroker(f"{servers.url}?{REPLICATED}&shards=3")
    await broker.open()
    yield broker
    await broker.close()


async def test_no_message_on_a_replica_is_lost_when_a_master_dies(
    servers: Servers, broker: Broker
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    sent: set[str] = set()
    over = asyncio.Event()

    async def send(number: int) -> None:
        for count in itertools.count():
            if over.is_set() and count > 20:
                return
            name = f"{number}.{count}"
            await insist(broker.publish, [envelope(name)], call_id=name)
            sent.add(name)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(send(number))
        while len(sent) < 200:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(servers.fail_over)
        # The new master may have no replica but the one that died, and takes nothing until then.
        await asyncio.to_thread(servers.start)
        over.set()
    got = await receive(consumer, len(sent))
    assert sorted(got) == sorted(sent)  # each once, as well
    await consumer.close()


async def test_publishing_fails_where_no_replica_takes_the_message(
    servers: Servers, broker: Broker
) -> None:
    nodes: list[RedisServer] = list(
        servers.servers if isinstance(servers, SentinelSet) else servers.nodes
    )
    masters = [servers.master] if isinstance(servers, SentinelSet) else list(servers.masters)
    replicas = [one for one in nodes if one not in masters]
    await broker.publish([envelope("before")])
    for one in masters:  # as WAIT looks away, no replica is heard of
        one.command("CONFIG SET repl-ping-replica-period 3600")
    for one in replicas:
        one.pause()
    try:
        with pytest.raises(BrokerUnavailable, match="0 of 1 replicas"):
            await broker.publish([envelope("a")], call_id="c")
    finally:
        for one in replicas:
            one.resume()
    assert not await insist(broker.publish, [envelope("a")], call_id="c")
    assert await insist(broker.depth) == {"q": Depth(ready=2)}


async def test_settlements_that_a_new_master_does_not_know_leave_nothing_held(
    servers: Servers, broker: Broker
) -> None:
    consumer = broker.consumer(["q"], name="w", lease=600.0)
    await consumer.open()
    await broker.publish([envelope(f"{n}") for n in range(10)])
    held = [await consumer.fetch(1, PATIENCE) for _ in range(10)]
    deliveries = [one for [one] in held]
    await broker.publish([envelope("last")])  # a replica has all of that
    parts = consumer._parts if isinstance(consumer, ClusterConsumer) else [consumer]
    for part in parts:  # as if these settlements had not come to the replica
        assert isinstance(part, RedisConsumer)
        part._held.clear()
    await asyncio.to_thread(servers.fail_over)
    if isinstance(servers, RedisCluster):
        for master in servers.masters:  # one died; the driver reconnects to the others, too
            master.command("CLIENT KILL TYPE normal")
    await asyncio.to_thread(servers.start)
    got = await receive(consumer, 11)
    assert sorted(got) == sorted([*(one.id for one in deliveries), "last"])
    assert await insist(broker.depth) == {}
    await consumer.close()


async def receive(consumer: Consumer, count: int) -> list[str]:
    got: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while len(got) < count:
            some = await insist(consumer.fetch, 1000, 0.2)
            await insist(consumer.settle, [Done(one) for one in some])
            got += [one.id for one in some]
    assert not await consumer.fetch(1, 0.1)
    return got


# --- Sentinel -----------------------------------------------------------------------------------


async def test_an_ordered_failover_is_followed_without_losing_a_message(
    redis_sentinel: SentinelSet, redis_sentinel_url: str
) -> None:
    broker = RedisBroker(redis_sentinel_url)
    await broker.open()
    await broker.publish([envelope("a")])
    before = redis_sentinel.master
    redis_sentinel.sentinels[0].command("SENTINEL FAILOVER mymaster")
    async with asyncio.timeout(2 * PATIENCE):
        while redis_sentinel.master is before:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(redis_sentinel.start)
    await insist(broker.publish, [envelope("b")])
    assert await insist(broker.depth) == {"q": Depth(ready=2)}
    await broker.close()


async def test_the_error_of_an_unknown_service_says_how_to_mend_it(
    redis_sentinel: SentinelSet, redis_sentinel_url: str
) -> None:
    broker = RedisBroker(redis_sentinel_url.replace("mymaster", "yours"))
    with pytest.raises(ConfigError, match="know no master 'yours'; name the right one with"):
        await broker.open()


async def test_one_sentinel_that_knows_no_master_is_no_configuration_error(
    redis_sentinel: SentinelSet, redis_sentinel_url: str
) -> None:
    sentinel = redis_sentinel.sentinels[0]
    url = f"redis+sentinel://{sentinel.host}:{sentinel.port},{sentinel.host}:1?service=yours"
    with pytest.raises(BrokerUnavailable, match="know no master 'yours'; name the right one with"):
        await RedisBroker(url).open()


async def test_without_a_sentinel_the_broker_is_unavailable() -> None:
    broker = RedisBroker("redis+sentinel://127.0.0.1:1,127.0.0.1:2")
    with pytest.raises(BrokerUnavailable):
        await broker.open()


# --- cluster ------------------------------------------------------------------------------------


@pytest.fixture
async def cluster(redis_cluster_url: str) -> AsyncIterator[ClusterBroker]:
    broker = ClusterBroker(redis_cluster_url)
    await broker.open()
    yield broker
    await broker.close()


async def test_a_slot_that_moves_is_followed_without_an_error(
    redis_cluster: RedisCluster, cluster: ClusterBroker
) -> None:
    await cluster.publish([envelope("a")])
    masters = list(redis_cluster.masters)
    replicas = [one for one in redis_cluster.nodes if one not in masters]
    for replica in replicas:
        async with asyncio.timeout(PATIENCE):
            while replica not in redis_cluster.masters:
                # A server gives it up after five seconds, and may have done nothing.
                replica.command("CLUSTER FAILOVER")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(6.0):
                        while replica not in redis_cluster.masters:
                            await asyncio.sleep(0.02)
    await asyncio.to_thread(redis_cluster.start)  # waits until all know
    await cluster.publish([envelope("b")])
    assert await cluster.depth() == {"q": Depth(ready=2)}


CUTS: dict[str, Callable[[ClusterBroker], Awaitable[object]]] = {
    "a run": lambda one: one.schedules().compare_and_swap(
        "s", None, StoredSchedule(id="s", body=b"", due_at=None, revision="1"), [envelope("a")]
    ),
    "a unique one": lambda one: one.publish([envelope("a", unique=True)]),
}


@pytest.mark.parametrize("sender", CUTS)
@pytest.mark.parametrize("call", ["pack", "unpack", "drop_parcel"])
async def test_a_message_moved_to_another_shard_arrives_once_whatever_step_is_cut_off(
    cluster: ClusterBroker, sender: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off = 0
    for client in cluster._clients:
        run = client.connection.script

        async def script(
            script: object, keys: object, words: object, run: Callable[..., Awaitable[object]] = run
        ) -> object:
            nonlocal cut_off
            reply = await run(script, keys, words)
            if script is getattr(scripts, call.upper()):
                cut_off += 1
                raise BrokerUnavailable("cut off")
            return reply

        monkeypatch.setattr(client.connection, "script", script)
    await CUTS[sender](cluster)
    monkeypatch.undo()
    assert cut_off == 1
    other = cluster.clone()
    await other.open()
    for _ in range(2):
        await other.maintain()
    assert await other.depth() == {"q": Depth(ready=1)}
    await other.close()


async def test_a_repetition_because_of_one_silent_node_reports_nothing_as_gone(
    redis_cluster: RedisCluster, redis_cluster_url: str
) -> None:
    url = f"{redis_cluster_url}?shards=3&socket_timeout=0.5"
    broker, backend = ClusterBroker(url), ClusterBackend(url)
    await broker.open()
    await backend.open()
    consumer = broker.consumer(["q"], name="w", lease=600.0)
    await consumer.open()
    ids = [f"{n}" for n in range(300)]
    await broker.publish([envelope(one) for one in ids])
    held: list[Delivery] = []
    while len(held) < len(ids):
        held += await consumer.fetch(len(ids), PATIENCE)
    settlements, outcomes = [Done(one) for one in held], [outcome(one) for one in ids]
    silent = redis_cluster.masters[1]
    silent.pause()
    try:
        with pytest.raises(BrokerUnavailable):
            await consumer.settle(settlements)
        with pytest.raises(BackendUnavailable):
            await backend.store(outcomes, 60.0)
    finally:
        silent.resume()
    assert not await insist(consumer.settle, settlements)
    assert not await insist(backend.store, outcomes, 60.0)
    # It is known now, and that was all.
    assert list(await consumer.settle(settlements)) == held
    assert sorted(await backend.store(outcomes, 60.0)) == sorted(ids)
    await consumer.close()
    await backend.close()
    await broker.close()


async def test_a_call_that_asks_for_the_nodes_during_close_leaves_no_connection(
    redis_cluster: RedisCluster, redis_cluster_url: str
) -> None:
    broker = ClusterBroker(redis_cluster_url)
    await broker.open()
    topology = broker._nodes.topology
    topology.doubt()
    calls = [asyncio.create_task(broker.depth()) for _ in range(3)]
    while not topology._asking.locked():
        await asyncio.sleep(0)
    await broker.close()
    for call in calls:
        with pytest.raises(BrokerUnavailable):
            await call
    async with asyncio.timeout(PATIENCE):
        while any("name=aiotaskq" in one.bulk("CLIENT LIST") for one in redis_cluster.masters):
            await asyncio.sleep(0.01)


async def test_the_error_of_a_server_of_another_kind_names_the_right_url(
    redis_cluster: RedisCluster,
    redis_cluster_url: str,
    redis_sentinel: SentinelSet,
    redis_sentinel_url: str,
) -> None:
    node, sentinel = redis_cluster.nodes[0], redis_sentinel.sentinels[0]
    single = redis_sentinel.master
    for broker, mend in (
        (RedisBroker(node.url()), "is a node of a cluster: its URL begins with redis+cluster://"),
        (RedisBroker(sentinel.url()), "is a sentinel: its URL begins with redis+sentinel://"),
        (RedisBroker(f"redis+sentinel://{single.host}:{single.port}"), "begins with redis://"),
        (ClusterBroker(f"redis+cluster://{single.host}:{single.port}"), "begins with redis://"),
    ):
        with pytest.raises(ConfigError, match=re.escape(mend)):
            await broker.open()


async def test_messages_follow_when_the_number_of_shards_changes(redis_cluster_url: str) -> None:
    few, many = ClusterBroker(redis_cluster_url), ClusterBroker(f"{redis_cluster_url}?shards=q:6,1")
    for broker in (few, many):
        await broker.open()
    await many.publish([envelope(f"{n}") for n in range(600)])
    await few.maintain()
    consumer = few.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    assert len(await receive(consumer, 600)) == 600
    await consumer.close()
    for broker in (few, many):
        await broker.close()


async def test_each_shard_keeps_its_order_and_gets_its_share(redis_cluster_url: str) -> None:
    broker = ClusterBroker(f"{redis_cluster_url}?shards=3")
    await broker.open()
    ids = [f"{n:04}" for n in range(900)]
    await broker.publish([envelope(one) for one in ids])
    consumer = broker.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    by_shard: dict[str, list[str]] = {}
    while got := await consumer.fetch(50, 0):
        for one in got:
            by_shard.setdefault(one.receipt[0], []).append(one.id)
        assert not await consumer.settle([Done(one) for one in got])
    assert [len(one) for one in by_shard.values()] == [300, 300, 300]
    assert all(one == sorted(one) for one in by_shard.values())
    await consumer.close()
    await broker.close()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis+cluster://h/1", "no database but 0"),
        ("redis+cluster://h?shards=0", "'0' is not a value of the option 'shards'"),
        ("redis+cluster://h?shards=13", "'13' is not a value"),
        ("redis+cluster://h?db=1", "no option 'db'"),
        ("redis+cluster://u:secret@h:port", "it names hosts as host:port"),
        ("redis+cluster://u:se/cret@h", "the password, before the @, are quoted"),
    ],
)
def test_a_wrong_cluster_url_is_refused_with_the_reason(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        ClusterBroker(url)
    assert "secret" not in str(caught.value)
