"""What may happen to a broker in a random history, and what must come of it. See `model`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeAlias

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from aiotaskq.contract.records import DeadLimits
from aiotaskq.errors import LeaseLost
from aiotaskq.testing.conformance.rig import maintain, on_another_loop
from aiotaskq.testing.model.machine import BrokerMachine, Kind
from aiotaskq.testing.model.state import QUEUES, UNIT, Copy, Shadow

MOST_UNITS = 72  # a unique id is forgotten after 86.4

Stored: TypeAlias = tuple[int | None, str, int, int, int, bool]
Choice: TypeAlias = list[tuple[int, Kind]]

# Most of it in one queue and at one level: order is seen only where messages meet.
players = st.integers(0, 2)
limits = st.integers(1, 5)
ids = st.sampled_from([None, None, None, 0, 1, 2])  # None: one that was never used
queues_of = st.sampled_from([QUEUES[0], QUEUES[0], QUEUES[0], QUEUES[1], QUEUES[2]])
levels = st.sampled_from([0, 0, 0, 9])
delays = st.sampled_from([0, 0, 0, 1, 2])  # units
lives = st.sampled_from([0, 0, 0, 0, 1, 2])  # units
stored: st.SearchStrategy[Stored] = st.tuples(ids, queues_of, levels, delays, lives, st.booleans())
batches = st.lists(stored, min_size=1, max_size=8)
kinds: st.SearchStrategy[Kind] = st.sampled_from(["done", "again", "later", "dead", "release"])
choices = st.lists(st.tuples(st.integers(0, 30), kinds), min_size=1, max_size=4)
picks = st.lists(st.integers(0, 30), min_size=1, max_size=3)


class BrokerRules(BrokerMachine):
    """The rules. `model.check_broker` runs them."""

    @initialize()
    def begin(self) -> None:
        async def go() -> None:
            self.harness = await self.harness_of()
            self.broker = await self.harness.broker()
            ordered = self.broker.traits.order
            self.shadow = Shadow(await self.harness.now(), ordered=ordered)

        self.run(go())
        for queues in (QUEUES, QUEUES[1:], QUEUES[::-1]):
            self.players.append(self.run(self._join(queues)))

    # --- rules: messages ------------------------------------------------------------------------

    @rule(batch=batches, calls=st.integers(0, 2), relative=st.booleans())
    def publish(self, batch: list[Stored], calls: int, relative: bool) -> None:
        """Store some, under a call id that is used again at once, or under none."""
        copies, refused, envelopes = [], [], []
        now = self.run(self.harness.now())
        for name, queue, priority, delay, life, unique in batch:
            copy = self._copy(name, queue, priority, delay, life)
            # Whether one that is never handed out counts as stored is nobody's promise.
            unique = unique and self.broker.traits.unique and copy.id not in self.shadow.cancelled
            envelopes.append(copy.envelope(now, relative=relative, unique=unique))
            if unique and copy.id in self.shadow.unique:
                refused.append(copy.id)
                continue
            if unique:
                self.shadow.unique.add(copy.id)
            copies.append(copy)
        if not self.broker.traits.idempotent:
            calls = min(calls, 1)
        call_id = None if calls == 0 else f"call {next(self.numbers)}"
        for _ in range(max(1, calls)):
            answer = self.run(self.broker.publish(envelopes, call_id=call_id))
            assert set(answer) == set(refused)
        for copy in copies:
            self.shadow.store(copy)

    @rule(number=players, limit=limits, order=st.none() | st.permutations(QUEUES))
    def fetch(self, number: int, limit: int, order: Sequence[str] | None = None) -> None:
        player = self._player(number)
        order = order and [queue for queue in order if queue in player.queues]
        if not player.alive:
            with pytest.raises(LeaseLost):
                self.run(player.consumer.fetch(limit, 0, order=order))
            self._replace(player, player.queues)  # as its worker would
            return
        self.run(self._take(player, limit, order))
        if self.shadow.held_by(player):
            self._hears_of_suspects(player)

    @rule(number=players, limit=limits, turns=st.integers(0, 12), closes=st.booleans())
    def cancel_a_fetch(self, number: int, limit: int, turns: int, closes: bool) -> None:
        """Cancel a fetch somewhere. What it took, if any, comes with the next, or goes back."""

        async def go() -> None:
            task = asyncio.ensure_future(player.consumer.fetch(limit, 0.01))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                self.shadow.handed(player, await task)
            while not closes and (got := await player.consumer.fetch(limit, 0)):
                self.shadow.handed(player, got)

        player = self._player(number)
        if player.alive:
            self.run(go())
            if closes:
                self._replace(player, player.queues)

    @rule(number=players, choice=choices, again=st.integers(0, 2))
    def settle(self, number: int, choice: Choice, again: int) -> None:
        """Settle deliveries, held or void ones, perhaps the same batch once more."""
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
        for _ in range(again):
            gone = self.run(player.consumer.settle(batch))
            assert sorted(one.id for one in gone) == sorted(one.delivery.id for one in batch)

    @rule(batch=batches, number=players, kind=kinds, other=kinds)
    def work(self, batch: list[Stored], number: int, kind: Kind, other: Kind) -> None:
        """Store, fetch, and settle what came: the first in one way, the rest in another."""
        self.publish(batch, 1, relative=True)
        self.fetch(number, 4)
        count = len(self.shadow.held_by(self._player(number)))
        self.settle(number, [(one, other if one else kind) for one in range(count)], 0)

    @precondition(lambda self: self.shadow.copies)
    @rule(number=st.integers(0, 100), held=st.booleans(), running=st.booleans())
    def cancel(self, number: int, held: bool, running: bool) -> None:
        copies = [one for one in self.shadow.copies if one.state == "held"] if held else []
        copies = copies or self.shadow.copies
        self._cancel(copies[-1 - number % len(copies)].id, running)

    def _cancel(self, name: str, running: bool) -> None:
        copies = self.shadow.of(name)
        held = [one for one in copies if one.state == "held" and not one.cancelled]
        # What becomes of the one that waits where another of its id is spared is not said.
        running = running or bool(held and any(one.waits for one in copies))
        answer = self.run(self.broker.cancel([name], running=running))
        if held and not running:
            assert list(answer) == [name]
            self._retry(held[0])  # spared means that it may come back
            return
        if answer and not running and not self.shadow.ordered:
            return  # one that waits may be held for a moment, without being handed out: spared
        self.shadow.cancelled.add(name)
        for copy in copies:
            if copy.waits:
                self.shadow.drop(copy)
        holders = {one.holder for one in held}
        for copy in held:
            copy.cancelled = True
        for player in holders:
            assert player is not None
            self.run(self._is_told(player, name))

    @rule(queue=st.sampled_from(QUEUES))
    def purge(self, queue: str) -> None:
        waiting = [one for one in self.shadow.copies if one.queue == queue and one.waits]
        count = self.run(self.broker.purge(queue))
        assert len(waiting) <= count <= len(waiting) + self.shadow.ghosts[queue]
        self.shadow.ghosts[queue] = 0
        for copy in waiting:
            copy.state = "gone"

    # --- rules: dead letters --------------------------------------------------------------------

    @precondition(lambda self: self.shadow.letters)
    @rule(chosen=picks, delay=delays)
    def revive(self, chosen: list[int], delay: int) -> None:
        """Revive some, a key that is gone among them."""
        queue = self._queue_of_letters(chosen[0])
        letters = self._read_letters(queue)
        now = self.run(self.harness.now())
        absent = self._copy(None, queue, 0, 0, 0)
        given = [("no key", absent.envelope(now, relative=True))]
        new = []
        for copy in {letters[one % len(letters)] for one in chosen}:
            again = self._copy(None, queue, copy.priority, delay, 0)
            again.id = copy.id
            # Of an id that was cancelled only where no other copy of it may be about.
            if copy.id in self.shadow.haunted or any(
                one.cancelled for one in self.shadow.of(copy.id)
            ):
                continue
            given.append((copy.key, again.envelope(now, relative=True)))
            new.append((copy, again))
        assert list(self.run(self.broker.revive(queue, given))) == ["no key"]
        for copy, again in new:
            self.shadow.unbury(copy)
            self.shadow.cancelled.discard(copy.id)
            self.shadow.store(again)

    @precondition(lambda self: self.shadow.letters)
    @rule(chosen=picks)
    def discard(self, chosen: list[int]) -> None:
        queue = self._queue_of_letters(chosen[0])
        letters = self._read_letters(queue)
        wanted = {letters[one % len(letters)] for one in chosen}
        keys = [one.key for one in wanted]
        assert self.run(self.broker.discard(queue, [*keys, "no key"])) == len(keys)
        assert self.run(self.broker.discard(queue, keys)) == 0
        for copy in wanted:
            self.shadow.unbury(copy)

    @precondition(lambda self: self.shadow.letters)
    @rule(most=st.integers(0, 2))
    def trim(self, most: int) -> None:
        """Tend with a limit, and see the oldest letters go."""
        beyond = [
            copy
            for queue in QUEUES
            for copy in [one for one in self.shadow.letters if one.queue == queue][: -most or None]
        ]
        assert self.run(maintain(self.broker, DeadLimits(most=most))).trimmed == len(beyond)
        for copy in beyond:
            self.shadow.unbury(copy)
        for queue in QUEUES:
            self._read_letters(queue)

    # --- rules: life and death ------------------------------------------------------------------

    @rule(number=players)
    def renew(self, number: int) -> None:
        player = self._player(number)

        async def go() -> bool:
            lease = player.broker.lease(player.consumer.grant)
            try:
                return await lease.renew()
            finally:
                await lease.close()

        # On the consumer's own loop too: there, it is cheap to try often.
        renewed = self.run(on_another_loop(go()) if number == 0 else go())
        assert renewed is player.alive
        player.renewed = self.shadow.units

    @rule(number=players)
    def end(self, number: int) -> None:
        """See a consumer die. Of one that is over already it changes nothing."""
        player, note = self._player(number), f"note {next(self.numbers)}"

        async def go() -> int:
            lease = self.broker.lease(player.consumer.grant)
            try:
                return await lease.end(note)
            finally:
                await lease.close()

        if self.leases:
            lost = self.shadow.die(player, note) if player.alive else []
            count = self.run(on_another_loop(go()) if number == 0 else go())
        else:
            count = self.run(self._kill(player))
            lost = self.shadow.die(player, None) if player.alive else []
        assert count == len(lost) or any(one.cancelled for one in lost)
        assert self.run(go()) == 0

    @rule(batch=batches, number=players, limit=limits, times=st.integers(1, 3))
    def crash(self, batch: list[Stored], number: int, limit: int, times: int) -> None:
        """Store, let a worker take some and die, again and again, until they are suspects."""
        self.publish(batch, 1, relative=True)
        for _ in range(times):
            if not self._player(number).alive:
                self._replace(self._player(number), self._player(number).queues)
            self.fetch(number, limit)
            self.end(number)

    @precondition(lambda self: self.leases and self.shadow.units < MOST_UNITS)
    @rule(units=st.sampled_from([1, 3]), spared=st.sets(players, max_size=3))
    def pass_time(self, units: int, spared: set[int]) -> None:
        """Let time pass, with signs of life of some, and maintain."""
        for _ in range(units):
            for number in spared:
                self.renew(number)
            self.shadow.units += 1
            self.run(self.harness.pass_time(UNIT))
        self.shadow.promote()
        self.those_who_live_are_told()
        self.maintain()

    @precondition(
        lambda self: self.leases and self.shadow.units < MOST_UNITS and self.harness.can_stall
    )
    @rule(times=st.integers(1, 3))
    def stall(self, times: int) -> None:
        """Let the server stand still for longer than a lease: nobody is to blame.

        Nor if it does so again before anybody could renew.
        """
        alive = [number for number, player in enumerate(self.players) if player.alive]
        # Only one of a queue's own can bear witness that others may live.
        witnesses = [one for one in alive if set(self.players[one].queues) == set(QUEUES)]
        for number in alive:
            self.renew(number)
        for _ in range(times if witnesses else 1):
            self.shadow.units += 3
            self.run(self.harness.stall(3 * UNIT))
            self.shadow.promote()
            for number in witnesses:
                assert self.run(maintain(self.players[number].broker)).reclaimed == 0
        for number in alive:
            self.renew(number)

    @rule()
    def maintain(self) -> None:
        lapsed = [one for one in self.players if one.alive and not self.shadow.trusts(one)]
        lost = [copy for player in lapsed for copy in self.shadow.die(player, None)]
        maintained = self.run(maintain(self.broker))
        if not any(one.cancelled for one in lost):
            assert maintained.reclaimed == len(lost)
        assert maintained.trimmed == 0

    @rule(number=players, queues=st.permutations(QUEUES), width=st.integers(1, len(QUEUES)))
    def replace(self, number: int, queues: list[str], width: int) -> None:
        """Close a consumer, and make a new one."""
        self._replace(self._player(number), queues[:width])

    # --- what holds at any time -----------------------------------------------------------------

    @invariant()
    def depth_tells_the_truth(self) -> None:
        self.run(self._in_time(self._check_depths))

    @rule()
    def those_who_live_are_told(self) -> None:
        told = {one.id for one in self.run(self.broker.consumers())}
        living = {one.consumer.id for one in self.players if one.alive and self.shadow.trusts(one)}
        assert told == living

    def teardown(self) -> None:
        """See that all that is left comes out, once, and that nothing stays; then close."""
        failed = sys.exc_info()[1] is not self.around
        try:
            # Of one that failed that would hide what failed by what follows from it.
            if hasattr(self, "shadow") and not failed:
                self.run(self._work_off())
                assert self.run(self.harness.leaks()) == []
        finally:
            self.run(self._close())
            self.runner.close()

    def _retry(self, copy: Copy) -> None:
        assert copy.holder is not None
        place = [one for _, one in copy.holder.deliveries[::-1]].index(copy)
        self.settle(self.players.index(copy.holder), [(place, "again")], 0)
