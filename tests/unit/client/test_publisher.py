"""The publisher: calls share a batch, repeats are safe."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.client.publisher import Publisher
from aiotaskq.contract.broker import Broker
from aiotaskq.errors import BatchRefused, BrokerFull, BrokerUnavailable, ConfigError, Unsupported
from tests.unit.client.drivers import RecordingBroker, RefusingBroker, envelope, until


async def test_callers_that_come_while_a_call_is_under_way_share_the_next() -> None:
    broker = RecordingBroker()
    broker.gate = asyncio.Event()
    publisher = Publisher(broker, 5)
    first = asyncio.create_task(publisher.publish([envelope("first")]))
    await until(lambda: broker.calls)
    others = [asyncio.create_task(publisher.publish([envelope(str(n))])) for n in range(100)]
    await asyncio.sleep(0)
    broker.gate.set()
    await asyncio.gather(first, *others)
    assert [ids for ids, _ in broker.calls] == [["first"], [str(n) for n in range(100)]]


async def test_a_lone_caller_is_sent_at_once() -> None:
    broker = RecordingBroker()
    publisher = Publisher(broker, 5)
    for n in range(3):
        await publisher.publish([envelope(str(n))])
    assert len(broker.calls) == 3


async def test_one_call_stays_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotaskq.client.publisher._ROUND", 10)
    monkeypatch.setattr("aiotaskq.client.publisher._ROUND_BYTES", 100)
    broker = RecordingBroker()
    publisher = Publisher(broker, 5)
    batches = [
        [envelope(f"a{n}") for n in range(25)],  # more than one round, from one caller
        [envelope("b0"), envelope("b1")],
        [envelope("c", 90)],
        [envelope("d", 500)],
        *[[envelope(f"e{n}")] for n in range(12)],
    ]
    await asyncio.gather(*[publisher.publish(batch) for batch in batches])
    assert [len(ids) for ids, _ in broker.calls] == [25, 3, 1, 10, 2]
    stored = await broker.depth()
    assert stored["q"].ready == 41


async def test_a_repeat_after_a_lost_reply_has_the_same_call_id_and_stores_once() -> None:
    broker = RecordingBroker()
    broker.errors = [BrokerUnavailable("lost"), BrokerUnavailable("lost")]
    publisher = Publisher(broker, 30)
    await publisher.publish([envelope("1")])
    ids = {call_id for _, call_id in broker.calls}
    assert len(broker.calls) == 3
    assert len(ids) == 1
    assert None not in ids
    assert (await broker.depth())["q"].ready == 1
    await publisher.publish([envelope("2")])
    assert broker.calls[-1][1] not in ids


async def test_a_long_outage_raises_to_every_caller() -> None:
    broker = RecordingBroker()
    broker.errors = [BrokerUnavailable("away")] * 1000
    publisher = Publisher(broker, 0.2)
    done = await asyncio.gather(
        *[publisher.publish([envelope(str(n))]) for n in range(3)], return_exceptions=True
    )
    assert [type(error) for error in done] == [BrokerUnavailable] * 3
    broker.errors = []
    await publisher.publish([envelope("later")])


async def test_an_error_that_no_repeat_can_help_raises_at_once() -> None:
    broker = RecordingBroker()
    broker.errors = [ConfigError("wrong password")]
    with pytest.raises(ConfigError):
        await Publisher(broker, 1000).publish([envelope("1")])
    assert len(broker.calls) == 1


@pytest.mark.parametrize("whole", [False, True], ids=["each", "whole"])
async def test_each_caller_hears_of_its_own_refusal_alone(whole: bool) -> None:
    full, never = BrokerFull("no room in q"), Unsupported("too long a delay")
    # A driver that stores all or none tells an outage of the whole server with BrokerFull.
    refusals: dict[str, Exception] = {"2": never, "5": never} if whole else {"2": never, "5": full}
    broker = RefusingBroker(refusals, whole=whole)
    broker.gate = asyncio.Event()
    publisher = Publisher(broker, 5)
    first = asyncio.create_task(publisher.publish([envelope("first")]))
    await until(lambda: broker.calls)
    others = [asyncio.create_task(publisher.publish([envelope(str(n))])) for n in range(8)]
    await asyncio.sleep(0)
    broker.gate.set()
    answers = await asyncio.gather(first, *others, return_exceptions=True)
    told = {n - 1: answer for n, answer in enumerate(answers) if isinstance(answer, Exception)}
    assert told == {2: refusals["2"], 5: refusals["5"]}
    assert (await broker.depth())["q"].ready == 7
    # Refused means not stored, and a later call is not hurt by it.
    stored = await _taken(broker)
    assert sorted(stored) == sorted(["first", *(str(n) for n in range(8) if n not in (2, 5))])
    await publisher.publish([envelope("later")])


async def test_a_caller_of_many_hears_the_positions_of_those_refused() -> None:
    never = Unsupported("too long a delay")
    broker = RefusingBroker({"b1": never, "b2": never}, whole=False)
    broker.gate = asyncio.Event()
    publisher = Publisher(broker, 5)
    first = asyncio.create_task(publisher.publish([envelope("first")]))
    await until(lambda: broker.calls)
    a, b = [
        asyncio.create_task(publisher.publish([envelope(f"{name}{n}") for n in range(4)]))
        for name in "ab"
    ]
    await asyncio.sleep(0)
    broker.gate.set()
    await asyncio.gather(first, a)
    with pytest.raises(BatchRefused, match="entry 1 of the batch was refused: too long") as info:
        await b
    assert info.value.errors == {1: never, 2: never}
    assert sorted(await _taken(broker)) == ["a0", "a1", "a2", "a3", "b0", "b3", "first"]


async def test_where_all_of_a_caller_are_refused_the_reason_itself_is_raised() -> None:
    broker = RefusingBroker({"1": Unsupported("a"), "2": Unsupported("b")}, whole=False)
    with pytest.raises(Unsupported, match="a"):
        await Publisher(broker, 5).publish([envelope("1"), envelope("2")])


async def test_a_cancelled_caller_does_not_hurt_the_others() -> None:
    broker = RecordingBroker()
    broker.gate = asyncio.Event()
    publisher = Publisher(broker, 5)
    first, second, third = [
        asyncio.create_task(publisher.publish([envelope(str(n))])) for n in range(3)
    ]
    await until(lambda: broker.calls)
    late = asyncio.create_task(publisher.publish([envelope("late")]))
    await asyncio.sleep(0)
    first.cancel()
    broker.gate.set()
    assert list(await second) == list(await third) == list(await late) == []
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_closing_waits_for_the_call_under_way() -> None:
    broker = RecordingBroker()
    broker.gate = asyncio.Event()
    publisher = Publisher(broker, 5)
    sending = asyncio.create_task(publisher.publish([envelope("1")]))
    await until(lambda: broker.calls)
    closing = asyncio.create_task(publisher.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    broker.gate.set()
    await closing
    await sending


async def _taken(broker: Broker) -> list[str]:
    consumer = broker.consumer(["q"], name="w", lease=60)
    await consumer.open()
    return [one.id for one in await consumer.fetch(100, 0)]
