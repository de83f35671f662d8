"""Random histories of a broker, checked step by step against a model (needs Hypothesis).

The model is a list of copies, each in one of five states. A copy is what one `publish` or
one `Again` stored; its body is a number that no other has, so that two copies of one id are
told apart. Time passes in whole units, and every deadline lies between two of them, so that
the seconds a slow machine takes do not matter.

What is checked: nothing is lost, nothing is held twice, a void receipt changes nothing,
queues and priorities are drained in order, crashes are counted, and `depth` tells the truth.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aiotaskq.errors import LeaseLost
from aiotaskq.message import Again, Dead, Delivery, Depth, Done, Envelope, Release, Settlement
from aiotaskq.protocols import Broker, Consumer
from aiotaskq.testing.rig import PATIENCE, BrokerHarness, elsewhere, tend

UNIT = 1000.0  # seconds
LEASE = 2.5 * UNIT
MOST_UNITS = 80  # a unique id is forgotten after 86.4
QUEUES = ("q1", "q 2", "q:3")

Value = TypeVar("Value")
State: TypeAlias = Literal["ready", "delayed", "held", "dead", "gone"]
Kind: TypeAlias = Literal["done", "again", "later", "dead", "release"]
Place: TypeAlias = Literal["head", "tail", "anywhere"]


@dataclass(eq=False)
class Copy:
    """What one `publish` or one `Again` stored."""

    number: int  # in the order of storing
    id: str
    queue: str
    priority: int
    due: float | None = None  # units
    crashes: int = 0
    state: State = "ready"
    place: Place = "tail"  # among the ready ones of its queue and priority
    holder: Player | None = None
    delivery: Delivery | None = None  # the latest
    cancelled: bool = False

    def envelope(self, now: float, unique: bool = False) -> Envelope:
        due = None if self.due is None else now + self.due * UNIT
        body = str(self.number).encode()
        return Envelope(
            id=self.id,
            queue=self.queue,
            body=body,
            priority=self.priority,
            not_before=due,
            unique=unique,
        )


@dataclass(eq=False)
class Player:
    """A consumer, and what the model knows of it."""

    consumer: Consumer
    queues: Sequence[str]
    renewed: int  # in units
    alive: bool = True
    deliveries: list[tuple[Delivery, Copy]] = field(default_factory=list)  # all it ever got


def check_broker(
    make_harness: Callable[[], BrokerHarness | Awaitable[BrokerHarness]],
    *,
    examples: int = 30,
    steps: int = 30,
) -> None:
    """Play random histories on a broker, a fresh harness each, and compare with the model.

    Call it in a plain test: each history runs on an event loop of its own. The harness's
    `pass_time` must not sleep; hours pass here.

    Args:
        make_harness: Returns a harness on an empty store, as it is or to be awaited.
        examples: How many histories.
        steps: The length of the longest.
    """

    class Machine(BrokerMachine):
        async def harness_of(self) -> BrokerHarness:
            made = make_harness()
            return await made if inspect.isawaitable(made) else made

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.filter_too_much,
                HealthCheck.data_too_large,
                HealthCheck.large_base_example,
            ],
        ),
    )


# Most of it in one queue and at one level: order is seen only where messages meet.
players = st.integers(0, 2)
limits = st.integers(1, 5)
ids = st.sampled_from([None, None, None, 0, 1, 2])  # None: one that was never used
queues_of = st.sampled_from([QUEUES[0], QUEUES[0], QUEUES[0], QUEUES[1], QUEUES[2]])
levels = st.sampled_from([0, 0, 0, 9])
delays = st.sampled_from([0, 0, 0, 1, 2])  # units
stored = st.tuples(ids, queues_of, levels, delays, st.booleans())
kinds: st.SearchStrategy[Kind] = st.sampled_from(["done", "again", "later", "dead", "release"])
choices = st.lists(st.tuples(st.integers(0, 30), kinds), min_size=1, max_size=4)


class BrokerMachine(RuleBasedStateMachine):
    """The rules. `check_broker` runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.copies: list[Copy] = []
        self.players: list[Player] = []
        self.numbers = itertools.count()
        self.units = 0  # passed so far
        self.unique: set[str] = set()  # ids stored under that demand
        self.cancelled: set[str] = set()
        self.ghosts: Counter[str] = Counter()  # cancelled and waiting: a broker may count them
        self.harness: BrokerHarness
        self.broker: Broker

    async def harness_of(self) -> BrokerHarness:
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        return self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        async def go() -> None:
            self.harness = await self.harness_of()
            self.broker = await self.harness.broker()

        self.run(go())
        for queues in (QUEUES, QUEUES[1:], QUEUES[::-1]):
            self.players.append(self.run(self._join(queues)))

    # --- rules ----------------------------------------------------------------------------------

    @rule(batch=st.lists(stored, min_size=1, max_size=8), calls=st.integers(0, 2))
    def publish(self, batch: list[tuple[int | None, str, int, int, bool]], calls: int) -> None:
        """Store some, under a call id that is used again at once, or under none."""
        copies, refused = [], []
        now = self.run(self.harness.now())
        envelopes = []
        for name, queue, priority, delay, unique in batch:
            copy = self._copy(name, queue, priority, delay)
            unique = unique and self.broker.traits.unique
            envelopes.append(copy.envelope(now, unique))
            if unique and copy.id in self.unique:
                refused.append(copy.id)
                continue
            if unique:
                self.unique.add(copy.id)
            copies.append(copy)
        call_id = None if calls == 0 else f"call {next(self.numbers)}"
        for _ in range(max(1, calls)):
            answer = self.run(self.broker.publish(envelopes, call_id=call_id))
            assert set(answer) == set(refused)
        for copy in copies:
            self._store(copy)

    @rule(number=players, limit=limits)
    def fetch(self, number: int, limit: int) -> None:
        player = self._player(number)
        if not player.alive:
            with pytest.raises(LeaseLost):
                self.run(player.consumer.fetch(limit, 0))
            self._replace(player, player.queues)  # as its worker would
            return
        there = sum(one.state == "ready" and one.queue in player.queues for one in self.copies)
        got = self.run(player.consumer.fetch(limit, 0))
        self._handed(player, got)
        assert len(got) == min(limit, there), "a short batch, though there was more"

    @rule(number=players, limit=limits, turns=st.integers(0, 12))
    def cancel_a_fetch(self, number: int, limit: int, turns: int) -> None:
        """Cancel a fetch somewhere. What it took, if any, comes with the next calls."""

        async def go() -> None:
            task = asyncio.ensure_future(player.consumer.fetch(limit, 0.01))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                self._handed(player, await task)
            while got := await player.consumer.fetch(limit, 0):
                self._handed(player, got)

        player = self._player(number)
        if player.alive:
            self.run(go())

    @rule(number=players, choice=choices, twice=st.booleans())
    def settle(self, number: int, choice: list[tuple[int, Kind]], twice: bool) -> None:
        """Settle deliveries, held or void ones, perhaps the same batch a second time."""
        player = self._player(number)
        if not player.deliveries:
            return
        latest = player.deliveries[::-1]  # small numbers mean recent ones
        wanted: dict[int, Kind] = {index % len(latest): kind for index, kind in choice}
        now = self.run(self.harness.now())
        batch, lost = [], []
        for index, kind in wanted.items():
            delivery, copy = latest[index]
            one, new = self._settlement(delivery, copy, kind, now)
            batch.append(one)
            if copy.delivery is delivery and copy.holder is player and copy.state == "held":
                self._settled(copy, kind, new)
            else:
                lost.append(delivery)
        gone = self.run(player.consumer.settle(batch))
        assert sorted(one.id for one in gone) == sorted(one.id for one in lost)
        if twice:
            gone = self.run(player.consumer.settle(batch))
            assert sorted(one.id for one in gone) == sorted(one.delivery.id for one in batch)

    @rule(number=players)
    def renew(self, number: int) -> None:
        player = self._player(number)

        async def go() -> bool:
            lease = player.consumer.lease()
            try:
                return await lease.renew()
            finally:
                await lease.close()

        # On the consumer's own loop too: there, it is cheap to try often.
        renewed = self.run(elsewhere(go()) if number == 0 else go())
        assert renewed is player.alive
        player.renewed = self.units

    @precondition(lambda self: self.units < MOST_UNITS)
    @rule(units=st.sampled_from([1, 3]), spared=st.sets(players, max_size=2))
    def pass_time(self, units: int, spared: set[int]) -> None:
        """Let time pass, with signs of life of some, and tend."""
        for _ in range(units):
            for number in spared:
                self.renew(number)
            self.units += 1
            self.run(self.harness.pass_time(UNIT))
        for copy in self.copies:
            if copy.state == "delayed" and copy.due is not None and copy.due < self.units:
                copy.state, copy.place = "ready", "anywhere"
        self.tend()

    @precondition(lambda self: self.units < MOST_UNITS)
    @rule(number=players, limit=limits)
    def crash(self, number: int, limit: int) -> None:
        """Let a consumer take some and die, while the others live on."""
        self.fetch(number, limit)
        self.pass_time(3, set(range(len(self.players))) - {number})

    @rule()
    def tend(self) -> None:
        lapsed = [one for one in self.players if one.alive and self._age(one) * UNIT > LEASE]
        lost = [one for one in self.copies if one.state == "held" and one.holder in lapsed]
        tended = self.run(tend(self.broker))
        for player in lapsed:
            player.alive = False
        for copy in lost:
            copy.crashes += 1
            self._give_back(copy)
        if not any(one.cancelled for one in lost):
            assert tended.reclaimed == len(lost)

    @rule(number=players, queues=st.permutations(QUEUES), width=st.integers(1, len(QUEUES)))
    def replace(self, number: int, queues: list[str], width: int) -> None:
        """Close a consumer, and make a new one."""
        self._replace(self._player(number), queues[:width])

    @precondition(lambda self: self.copies)
    @rule(number=st.integers(0, 100))
    def cancel(self, number: int) -> None:
        name = self.copies[-1 - number % len(self.copies)].id
        self.run(self.broker.cancel([name]))
        self.cancelled.add(name)
        holders = set()
        for copy in self.copies:
            if copy.id == name and copy.state in ("ready", "delayed"):
                self._drop(copy)
            elif copy.id == name and copy.state == "held" and not copy.cancelled:
                copy.cancelled = True
                holders.add(copy.holder)
        for player in holders:
            assert player is not None
            self.run(self._is_told(player, name))

    @rule(queue=st.sampled_from(QUEUES))
    def purge(self, queue: str) -> None:
        waiting = [
            one for one in self.copies if one.queue == queue and one.state in ("ready", "delayed")
        ]
        count = self.run(self.broker.purge(queue))
        assert len(waiting) <= count <= len(waiting) + self.ghosts[queue]
        self.ghosts[queue] = 0
        for copy in waiting:
            copy.state = "gone"

    @invariant()
    def depth_tells_the_truth(self) -> None:
        depths = self.run(self.broker.depth())
        assert set(depths) <= set(QUEUES)
        for queue in QUEUES:
            depth = depths.get(queue, Depth())
            states = Counter(one.state for one in self.copies if one.queue == queue)
            ghosts = self.ghosts[queue]
            waits = states["ready"] + states["delayed"]
            assert depth.held == states["held"], queue
            assert depth.dead == states["dead"], queue
            assert depth.ready >= states["ready"], queue
            assert depth.delayed >= states["delayed"], queue
            assert waits <= depth.ready + depth.delayed <= waits + ghosts, queue

    def teardown(self) -> None:
        """See that all that is left comes out, once; then close."""
        try:
            if hasattr(self, "broker"):
                self.run(self._drain())
        finally:
            self.runner.close()

    # --- the model ------------------------------------------------------------------------------

    def _player(self, number: int) -> Player:
        return self.players[number % len(self.players)]

    def _replace(self, player: Player, queues: Sequence[str]) -> None:
        self.run(player.consumer.close())
        self._closed(player)
        place = self.players.index(player)
        self.players[place] = self.run(self._join(queues))

    def _closed(self, player: Player) -> None:
        for copy in self.copies:
            if copy.state == "held" and copy.holder is player:
                self._give_back(copy)

    def _give_back(self, copy: Copy) -> None:
        """Put a held copy at the head again, or drop it if it was cancelled."""
        copy.state, copy.place = "ready", "head"
        if copy.cancelled:
            self._drop(copy)

    def _drop(self, copy: Copy) -> None:
        copy.state = "gone"
        self.ghosts[copy.queue] += 1

    def _age(self, player: Player) -> int:
        return self.units - player.renewed

    def _copy(self, name: int | None, queue: str, priority: int, delay: int) -> Copy:
        number = next(self.numbers)
        known = "fresh" if name is None else f"id {name}"
        # An id that was cancelled is not used again: what that means is nobody's promise.
        if name is None or known in self.cancelled:
            known = f"id of {number}"
        if not self.broker.traits.priorities:
            priority = 0
        due = delay - 0.5 if delay else None
        return Copy(number=number, id=known, queue=queue, priority=priority, due=due)

    def _store(self, copy: Copy) -> None:
        if copy.due is not None:
            copy.due += self.units
            copy.state = "delayed"
        self.copies.append(copy)

    def _handed(self, player: Player, got: Sequence[Delivery]) -> None:
        """Check what was handed out, one by one, against what was ready."""
        for delivery in got:
            copy = next(one for one in self.copies if one.number == int(delivery.body))
            assert copy.state == "ready", f"{copy.state}, and handed out"
            for other in self.copies:
                if other.state == "ready" and other.queue in player.queues:
                    assert not self._goes_before(other, copy, player), f"{other} before {copy}"
            assert delivery.id == copy.id
            assert delivery.queue == copy.queue
            assert delivery.priority == copy.priority
            assert delivery.crashes == copy.crashes
            copy.state, copy.holder, copy.delivery = "held", player, delivery
            player.deliveries.append((delivery, copy))

    def _goes_before(self, one: Copy, other: Copy, player: Player) -> bool:
        """Tell whether `one` must be handed out before `other`."""
        first = player.queues.index(one.queue), -one.priority
        second = player.queues.index(other.queue), -other.priority
        if first != second:
            return first < second
        if other.place == "tail":
            return one.place == "head" or (one.place == "tail" and one.number < other.number)
        return False

    def _settlement(
        self, delivery: Delivery, copy: Copy, kind: Kind, now: float
    ) -> tuple[Settlement, Copy | None]:
        if kind == "done":
            return Done(delivery), None
        if kind == "dead":
            return Dead(delivery, f"reason of {copy.number}"), None
        if kind == "release":
            return Release(delivery), None
        new = self._copy(None, copy.queue, copy.priority, 1 if kind == "later" else 0)
        new.id = copy.id
        return Again(delivery, new.envelope(now)), new

    def _settled(self, copy: Copy, kind: Kind, new: Copy | None) -> None:
        if kind == "release":
            self._give_back(copy)
            return
        copy.state = "dead" if kind == "dead" else "gone"
        if new is not None:
            self._store(new)
            if copy.cancelled:
                self._drop(new)

    async def _join(self, queues: Sequence[str]) -> Player:
        broker = await self.harness.broker()
        consumer = broker.consumer(queues, name="model", lease=LEASE)
        await consumer.open()
        return Player(consumer, tuple(queues), self.units)

    async def _is_told(self, player: Player, name: str) -> None:
        told: set[str] = set()
        async with asyncio.timeout(PATIENCE):
            while name not in told:
                told |= set(await player.consumer.cancelled())
                await asyncio.sleep(0)

    async def _drain(self) -> None:
        for player in self.players:
            await player.consumer.close()
            self._closed(player)
        await self.harness.pass_time(4 * UNIT)
        await tend(self.broker)
        consumer = self.broker.consumer(QUEUES, name="last", lease=LEASE)
        await consumer.open()
        left: list[Delivery] = []
        while got := await consumer.fetch(100, 0):
            left += got
        await consumer.close()
        await self.harness.close()
        waiting = [one.number for one in self.copies if one.state in ("ready", "delayed")]
        assert sorted(int(one.body) for one in left) == sorted(waiting)
