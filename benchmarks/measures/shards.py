"""One queue of a Redis cluster on three shards, compared with one shard.

There are three masters, and one process that stores tasks, then takes them in batches of 100 and
settles them. On a machine with few cores the nodes share the cores with the process that loads
them, so elapsed time would measure the machine. Instead, the CPU time of the busiest node is
measured, and from it the rate that this node can sustain: no queue is faster than its busiest node.

A consumer that holds messages takes from one shard after the other. A consumer that holds nothing
first looks into all of them, for suspects. So there are two measurements: with a batch held while
the next one is fetched, as by a worker that is never idle, and with each batch settled before the
next one is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers import create_broker
from benchmarks.figures import Figure
from benchmarks.measures.bench import Bench, run
from tests.servers import RedisCluster, Watchdog

_BATCH = 100
_BODY = b"x" * 200


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield the rates that the busiest node allows with one and three shards, and their ratio."""
    count = bench.size(50_000, 2_000)
    rates: dict[tuple[bool, int], list[float]] = {
        (ahead, shards): [] for ahead in (True, False) for shards in (1, 3)
    }
    watchdog = Watchdog()
    cluster = RedisCluster(watchdog, replicas=False, options={"appendonly": "no"})
    try:
        cluster.start()
        for _ in range(bench.runs(3)):
            for (ahead, shards), taken in rates.items():
                cluster.flush()
                before = [_cpu(cluster, number) for number in range(3)]
                run(_pass(f"{cluster.url}?shards={shards}", count, ahead=ahead))
                spent = [_cpu(cluster, number) - was for number, was in enumerate(before)]
                taken.append(count / max(spent))
    finally:
        cluster.close()
        watchdog.close()
    for ahead, way in ((True, "a batch held while fetching"), (False, "each batch settled first")):
        for shards in (1, 3):
            what = f"{shards} shard{'s' * (shards > 1)} over three nodes, {way}: the busiest allows"
            yield Figure(what, "tasks/s", rates[ahead, shards])
        pairs = zip(rates[ahead, 1], rates[ahead, 3], strict=True)
        yield Figure(
            f"three shards against one, {way}", "ratio", [three / one for one, three in pairs]
        )


def _cpu(cluster: RedisCluster, number: int) -> float:
    facts = cluster.nodes[number].info("cpu")
    return float(facts["used_cpu_user"]) + float(facts["used_cpu_sys"])


async def _pass(url: str, count: int, *, ahead: bool) -> None:
    broker = create_broker(url, prefix="aiotaskq")
    await broker.open()
    for start in range(0, count, _BATCH):
        await broker.publish(
            [Envelope(id=f"{n}", queue="q", body=_BODY) for n in range(start, start + _BATCH)]
        )
    consumer = broker.consumer(["q"], name="bench", lease=600.0)
    await consumer.open()
    left, held = count, await consumer.fetch(_BATCH, 1.0)
    while left:
        fetched = await consumer.fetch(_BATCH, 0.0) if ahead else []
        await consumer.settle([Done(one) for one in held])
        left -= len(held)
        held = fetched if ahead else await consumer.fetch(_BATCH, 0.0)
    await consumer.close()
    await broker.close()
