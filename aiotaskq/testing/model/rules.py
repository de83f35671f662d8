"""The rules of a random history: each changes the broker and the model, and compares them."""

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
from aiotaskq.testing.model.state import QUEUES, UNIT, Copy, ModelState

MOST_UNITS = 72  # fewer than 86.4, the day after which a unique id is forgotten

Stored: TypeAlias = tuple[int | None, str, int, int, int, bool]
Choice: TypeAlias = list[tuple[int, Kind]]

# Most messages share one queue and one priority: order shows only among those.
workers = st.integers(0, 2)
limits = st.integers(1, 5)
ids = st.sampled_from([None, None, None, 0, 1, 2])  # None: a new one
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
    """The rules. `check.check_broker` runs them."""

    @initialize()
    def begin(self) -> None:
        async def go() -> None:
            self.harness = await self.open_harness()
            self.broker = await self.harness.broker()
            ordered = self.broker.traits.order
            self.model = ModelState(await self.harness.now(), ordered=ordered)

        self.run(go())
        for queues in (QUEUES, QUEUES[1:], QUEUES[::-1]):
            self.workers.append(self.run(self._open_worker(queues)))

    # --- rules: messages ------------------------------------------------------------------------

    @rule(batch=batches, calls=st.integers(0, 2), relative=st.booleans())
    def publish(self, batch: list[Stored], calls: int, relative: bool) -> None:
        """Publish a batch: under no call id, or once or twice under the same one."""
        copies, refused, envelopes = [], [], []
        now = self.run(self.harness.now())
        for name, queue, priority, delay, life, unique in batch:
            copy = self._new_copy(name, queue, priority, delay, life)
            # The contract leaves open whether a cancelled copy counts as stored.
            unique = unique and self.broker.traits.unique and copy.id not in self.model.cancelled
            envelopes.append(copy.envelope(now, relative=relative, unique=unique))
            if unique and copy.id in self.model.unique:
                refused.append(copy.id)
                continue
            if unique:
                self.model.unique.add(copy.id)
            copies.append(copy)
        if not self.broker.traits.idempotent:
            calls = min(calls, 1)
        call_id = None if calls == 0 else f"call {next(self.numbers)}"
        for _ in range(max(1, calls)):
            answer = self.run(self.broker.publish(envelopes, call_id=call_id))
            assert set(answer) == set(refused)
        for copy in copies:
            self.model.store(copy)

    @rule(number=workers, limit=limits, order=st.none() | st.permutations(QUEUES))
    def fetch(self, number: int, limit: int, order: Sequence[str] | None = None) -> None:
        worker = self._worker(number)
        order = order and [queue for queue in order if queue in worker.queues]
        if not worker.alive:
            with pytest.raises(LeaseLost):
                self.run(worker.consumer.fetch(limit, 0, order=order))
            self._replace(worker, worker.queues)  # as a worker would
            return
        self.run(self._fetch(worker, limit, order))
        if self.model.held_by(worker):
            self._check_suspect_news(worker)

    @rule(number=workers, limit=limits, turns=st.integers(0, 12), closes=st.booleans())
    def cancel_a_fetch(self, number: int, limit: int, turns: int, closes: bool) -> None:
        """Cancel a fetch at some point: copies that it took come with the next one, or go back."""

        async def go() -> None:
            task = asyncio.ensure_future(worker.consumer.fetch(limit, 0.01))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                self.model.check_deliveries(worker, await task)
            while not closes and (got := await worker.consumer.fetch(limit, 0)):
                self.model.check_deliveries(worker, got)

        worker = self._worker(number)
        if worker.alive:
            self.run(go())
            if closes:
                self._replace(worker, worker.queues)

    @rule(number=workers, choice=choices, again=st.integers(0, 2))
    def settle(self, number: int, choice: Choice, again: int) -> None:
        """Settle held and void deliveries, perhaps the same batch once more."""
        worker = self._worker(number)
        if not worker.deliveries:
            return
        latest = worker.deliveries[::-1]  # small numbers mean recent ones
        wanted: dict[int, Kind] = {index % len(latest): kind for index, kind in choice}
        now = self.run(self.harness.now())
        batch, lost = [], []
        for index, kind in wanted.items():
            delivery, copy = latest[index]
            one, new = self._settlement(delivery, copy, kind, now)
            batch.append(one)
            if copy.delivery is delivery and copy.holder is worker and copy.state == "held":
                self._apply_settlement(copy, kind, new)
            else:
                lost.append(delivery)
        gone = self.run(worker.consumer.settle(batch))
        assert sorted(one.id for one in gone) == sorted(one.id for one in lost)
        for _ in range(again):
            gone = self.run(worker.consumer.settle(batch))
            assert sorted(one.id for one in gone) == sorted(one.delivery.id for one in batch)

    @rule(batch=batches, number=workers, kind=kinds, other=kinds)
    def work(self, batch: list[Stored], number: int, kind: Kind, other: Kind) -> None:
        """Publish, fetch and settle: the first delivery in one way, the others in another."""
        self.publish(batch, 1, relative=True)
        self.fetch(number, 4)
        count = len(self.model.held_by(self._worker(number)))
        self.settle(number, [(one, other if one else kind) for one in range(count)], 0)

    @precondition(lambda self: self.model.copies)
    @rule(number=st.integers(0, 100), held=st.booleans(), running=st.booleans())
    def cancel(self, number: int, held: bool, running: bool) -> None:
        copies = [one for one in self.model.copies if one.state == "held"] if held else []
        copies = copies or self.model.copies
        self._cancel(copies[-1 - number % len(copies)].id, running)

    def _cancel(self, name: str, running: bool) -> None:
        copies = self.model.copies_of(name)
        held = [one for one in copies if one.state == "held" and not one.cancelled]
        # The contract leaves open what happens to a waiting copy while another of its id is spared.
        running = running or bool(held and any(one.waits for one in copies))
        answer = self.run(self.broker.cancel([name], running=running))
        if held and not running:
            assert list(answer) == [name]
            self._retry(held[0])  # a spared copy may come back
            return
        if answer and not running and not self.model.ordered:
            return  # without order a waiting copy may be held for a moment, and is spared then
        self.model.cancelled.add(name)
        for copy in copies:
            if copy.waits:
                self.model.drop(copy)
        holders = {one.holder for one in held}
        for copy in held:
            copy.cancelled = True
        for worker in holders:
            assert worker is not None
            self.run(self._wait_for_cancel_news(worker, name))

    @rule(queue=st.sampled_from(QUEUES))
    def purge(self, queue: str) -> None:
        waiting = [one for one in self.model.copies if one.queue == queue and one.waits]
        count = self.run(self.broker.purge(queue))
        assert len(waiting) <= count <= len(waiting) + self.model.cancelled_waiting[queue]
        self.model.cancelled_waiting[queue] = 0
        for copy in waiting:
            copy.state = "gone"

    # --- rules: dead letters --------------------------------------------------------------------

    @precondition(lambda self: self.model.dead_letters)
    @rule(chosen=picks, delay=delays)
    def revive(self, chosen: list[int], delay: int) -> None:
        """Revive dead letters, and one key that does not exist."""
        queue = self._queue_with_dead_letters(chosen[0])
        letters = self._read_dead_letters(queue)
        now = self.run(self.harness.now())
        absent = self._new_copy(None, queue, 0, 0, 0)
        given = [("no key", absent.envelope(now, relative=True))]
        new = []
        for copy in {letters[one % len(letters)] for one in chosen}:
            again = self._new_copy(None, queue, copy.priority, delay, 0)
            again.id = copy.id
            # A cancelled id is revived only if no other copy of it may be left.
            if copy.id in self.model.cancelled_waiting_ids or any(
                one.cancelled for one in self.model.copies_of(copy.id)
            ):
                continue
            given.append((copy.key, again.envelope(now, relative=True)))
            new.append((copy, again))
        assert list(self.run(self.broker.revive(queue, given))) == ["no key"]
        for copy, again in new:
            self.model.remove_dead_letter(copy)
            self.model.cancelled.discard(copy.id)
            self.model.store(again)

    @precondition(lambda self: self.model.dead_letters)
    @rule(chosen=picks)
    def discard(self, chosen: list[int]) -> None:
        queue = self._queue_with_dead_letters(chosen[0])
        letters = self._read_dead_letters(queue)
        wanted = {letters[one % len(letters)] for one in chosen}
        keys = [one.key for one in wanted]
        assert self.run(self.broker.discard(queue, [*keys, "no key"])) == len(keys)
        assert self.run(self.broker.discard(queue, keys)) == 0
        for copy in wanted:
            self.model.remove_dead_letter(copy)

    @precondition(lambda self: self.model.dead_letters)
    @rule(most=st.integers(0, 2))
    def trim(self, most: int) -> None:
        """Call `maintain` with a limit: the oldest dead letters are trimmed."""
        beyond = [
            copy
            for queue in QUEUES
            for copy in [one for one in self.model.dead_letters if one.queue == queue][
                : -most or None
            ]
        ]
        assert self.run(maintain(self.broker, DeadLimits(most=most))).trimmed == len(beyond)
        for copy in beyond:
            self.model.remove_dead_letter(copy)
        for queue in QUEUES:
            self._read_dead_letters(queue)

    # --- rules: life and death ------------------------------------------------------------------

    @rule(number=workers)
    def renew(self, number: int) -> None:
        worker = self._worker(number)

        async def go() -> bool:
            lease = worker.broker.lease(worker.consumer.grant)
            try:
                return await lease.renew()
            finally:
                await lease.close()

        # On the consumer's own loop too, where it is fast enough to try often.
        renewed = self.run(on_another_loop(go()) if number == 0 else go())
        assert renewed is worker.alive
        worker.renewed = self.model.units

    @rule(number=workers)
    def end(self, number: int) -> None:
        """End the lease of a consumer. If it is over already, nothing changes."""
        worker, note = self._worker(number), f"note {next(self.numbers)}"

        async def go() -> int:
            lease = self.broker.lease(worker.consumer.grant)
            try:
                return await lease.end(note)
            finally:
                await lease.close()

        if self.leases:
            lost = self.model.give_up(worker, note) if worker.alive else []
            count = self.run(on_another_loop(go()) if number == 0 else go())
        else:
            count = self.run(self._kill(worker))
            lost = self.model.give_up(worker, None) if worker.alive else []
        assert count == len(lost) or any(one.cancelled for one in lost)
        assert self.run(go()) == 0

    @rule(batch=batches, number=workers, limit=limits, times=st.integers(1, 3))
    def crash(self, batch: list[Stored], number: int, limit: int, times: int) -> None:
        """Publish; fetch and end the consumer, up to three times, which makes suspects."""
        self.publish(batch, 1, relative=True)
        for _ in range(times):
            if not self._worker(number).alive:
                self._replace(self._worker(number), self._worker(number).queues)
            self.fetch(number, limit)
            self.end(number)

    @precondition(lambda self: self.leases and self.model.units < MOST_UNITS)
    @rule(units=st.sampled_from([1, 3]), spared=st.sets(workers, max_size=3))
    def pass_time(self, units: int, spared: set[int]) -> None:
        """Pass time while some consumers renew their leases, then call `maintain`."""
        for _ in range(units):
            for number in spared:
                self.renew(number)
            self.model.units += 1
            self.run(self.harness.pass_time(UNIT))
        self.model.promote()
        self.living_consumers_are_listed()
        self.maintain()

    @precondition(
        lambda self: self.leases and self.model.units < MOST_UNITS and self.harness.can_stall
    )
    @rule(times=st.integers(1, 3))
    def stall(self, times: int) -> None:
        """Let the server stand still for longer than a lease, several times: no lease lapses."""
        alive = [number for number, worker in enumerate(self.workers) if worker.alive]
        # Only a consumer of the same queue notices that others had no chance to renew.
        witnesses = [one for one in alive if set(self.workers[one].queues) == set(QUEUES)]
        for number in alive:
            self.renew(number)
        for _ in range(times if witnesses else 1):
            self.model.units += 3
            self.run(self.harness.stall(3 * UNIT))
            self.model.promote()
            for number in witnesses:
                assert self.run(maintain(self.workers[number].broker)).reclaimed == 0
        for number in alive:
            self.renew(number)

    @rule()
    def maintain(self) -> None:
        lapsed = [one for one in self.workers if one.alive and not self.model.lease_runs(one)]
        lost = [copy for worker in lapsed for copy in self.model.give_up(worker, None)]
        maintained = self.run(maintain(self.broker))
        if not any(one.cancelled for one in lost):
            assert maintained.reclaimed == len(lost)
        assert maintained.trimmed == 0

    @rule(number=workers, queues=st.permutations(QUEUES), width=st.integers(1, len(QUEUES)))
    def replace(self, number: int, queues: list[str], width: int) -> None:
        """Close a consumer, and open a new one."""
        self._replace(self._worker(number), queues[:width])

    # --- checks ---------------------------------------------------------------------------------

    @invariant()
    def depth_agrees(self) -> None:
        self.run(self._eventually(self._check_depths))

    @rule()
    def living_consumers_are_listed(self) -> None:
        told = {one.id for one in self.run(self.broker.consumers())}
        living = {
            one.consumer.id for one in self.workers if one.alive and self.model.lease_runs(one)
        }
        assert told == living

    def teardown(self) -> None:
        """Check that each copy left is delivered once, and that the store is empty then; close."""
        failed = sys.exc_info()[1] is not self.outer_exception
        try:
            # After a failure these checks would fail as well, and hide its cause.
            if hasattr(self, "model") and not failed:
                self.run(self._drain())
                assert self.run(self.harness.leaks()) == []
        finally:
            self.run(self._close())
            self.runner.close()

    def _retry(self, copy: Copy) -> None:
        assert copy.holder is not None
        place = [one for _, one in copy.holder.deliveries[::-1]].index(copy)
        self.settle(self.workers.index(copy.holder), [(place, "again")], 0)
