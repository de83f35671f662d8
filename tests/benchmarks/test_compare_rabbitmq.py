"""The comparison with other task queues: targets, pairs and counted messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.rabbitmq import RabbitBroker
from benchmarks import report
from benchmarks.compare import choose, references
from benchmarks.figures import Figure, Report
from benchmarks.rivals.contestants import find
from benchmarks.rivals.stores import RabbitStore
from tests.servers import Watchdog


@pytest.mark.parametrize(
    ("named", "ours"),
    [
        (["saq"], {"aiotaskq"}),
        (["pgqueuer"], {"aiotaskq-postgres"}),
        (["taskiq-aio-pika"], {"aiotaskq-rabbitmq", "aiotaskq-rabbitmq-rpc"}),
        (["saq", "pgqueuer"], {"aiotaskq", "aiotaskq-postgres"}),
    ],
)
def test_our_targets_run_on_the_servers_of_the_named_rivals(
    named: list[str], ours: set[str]
) -> None:
    chosen = choose(find(), named)
    assert {one.name for one in chosen if one.is_ours} == ours
    assert {one.name for one in chosen if not one.is_ours} == set(named)


def test_each_rival_is_compared_with_our_first_target_on_the_same_server() -> None:
    beside = references(find())
    assert beside["bullmq"] == "aiotaskq"
    assert beside["pgqueuer"] == "aiotaskq-postgres"
    assert beside["celery-rabbitmq"] == "aiotaskq-rabbitmq"
    assert beside["aiotaskq-rabbitmq-rpc"] == "aiotaskq-rabbitmq"
    assert "aiotaskq-rabbitmq" not in beside


def _contestant(server: str) -> dict[str, Any]:
    return {"settings": "", "durability": "", "server": server, "stores_results": True}


def test_the_table_of_a_broker_holds_the_rival_against_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "not measured yet" in report.rabbitmq_table()
    file = tmp_path / "compare-rabbitmq.json"
    rates = {"aiotaskq-rabbitmq": 2000.0, "taskiq-aio-pika": 1000.0}
    figures = [
        Figure(f"noop: {part}", "", [rate], who=who)
        for who, rate in rates.items()
        for part in ("rate", "worker CPU", "server CPU", "peak memory")
    ]
    Report(figures, {}).write(file)
    told = msgspec.json.decode(file.read_bytes())
    told["contestants"] = {who: _contestant("rabbitmq") for who in rates}
    file.write_bytes(msgspec.json.encode(told))
    lines = report.rabbitmq_table().splitlines()
    assert lines[2].startswith("| aiotaskq-rabbitmq |")
    assert lines[3].endswith("| 2.0 | ≥ 3 | **no** |")


@pytest.mark.slow
@pytest.mark.usefixtures(
    "rabbit_server", "redis_server"
)  # only to skip the test where they are missing
async def test_waiting_and_held_messages_of_rabbitmq_are_counted(watchdog: Watchdog) -> None:
    store = RabbitStore(watchdog)
    try:
        broker = RabbitBroker(store.variables()["BENCH_RABBITMQ_URL"])
        await broker.open()
        await broker.publish([Envelope(id=f"{n}", queue="q", body=b"x") for n in range(3)])
        consumer = broker.consumer(["q"], name="w", lease=60.0)
        await consumer.open()
        assert len(await consumer.fetch(1, 10.0)) == 1
        assert store.count("queue: aiotaskq[.]queue[.]q") == 3
        assert store.count("queue: aiotaskq[.]que") == 0
        assert store.count("1: DBSIZE") == 0
        await consumer.close()
        await broker.close()
        store.empty()
        assert store.count("queue: .*") == 0
    finally:
        store.close()
