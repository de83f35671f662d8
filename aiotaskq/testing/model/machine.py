"""What the rules of a random history are made of. See `rules` and `model`."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from hypothesis.stateful import RuleBasedStateMachine

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import DeadLetter, DeadLimits, Depth, Maintained
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.testing.conformance.harness import BrokerHarness, LethalHarness
from aiotaskq.testing.conformance.rig import MOMENT, PATIENCE, maintain
from aiotaskq.testing.model.state import LEASE, QUEUES, UNIT, Copy, Player, Shadow

_SOON = 5.0  # seconds

Value = TypeVar("Value")
Kind: TypeAlias = Literal["done", "again", "later", "dead", "release"]


class BrokerMachine(RuleBasedStateMachine):
    """The state of a history, and what its rules do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.around = sys.exc_info()[1]  # what is being handled where the history is played
        self.runner = asyncio.Runner()
        self.players: list[Player] = []
        self.numbers = itertools.count()
        self.harness: BrokerHarness
        self.broker: Broker
        self.shadow: Shadow

    async def harness_of(self) -> BrokerHarness:
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        return self.runner.run(work)

    @property
    def leases(self) -> bool:
        """Whether leases run out by a clock, and may be ended by others."""
        return self.broker.traits.leases

    def _player(self, number: int) -> Player:
        return self.players[number % len(self.players)]

    async def _join(self, queues: Sequence[str]) -> Player:
        broker = await self.harness.broker()
        consumer = broker.consumer(queues, name="model", lease=LEASE)
        await consumer.open()
        return Player(broker, consumer, tuple(queues), self.shadow.units)

    def _replace(self, player: Player, queues: Sequence[str]) -> None:
        self.run(player.consumer.close())
        self.shadow.leave(player)
        place = self.players.index(player)
        self.players[place] = self.run(self._join(queues))

    def _copy(self, name: int | None, queue: str, priority: int, delay: int, life: int) -> Copy:
        number = next(self.numbers)
        known = f"id of {number}" if name is None else f"id {name}"
        if not self.broker.traits.priorities:
            priority = 0
        if not self.broker.traits.clock:  # nor can it be moved: hours would really pass
            delay = life = 0
        return Copy(number, known, queue, priority, delay=delay, life=life)

    def _settlement(
        self, delivery: Delivery, copy: Copy, kind: Kind, now: float
    ) -> tuple[Settlement, Copy | None]:
        if kind == "done":
            return Done(delivery), None
        if kind == "dead":
            return Dead(delivery, f"reason of {copy.number}", b"details"), None
        if kind == "release":
            return Release(delivery), None
        new = self._copy(None, copy.queue, copy.priority, 1 if kind == "later" else 0, 0)
        new.id = copy.id
        return Again(delivery, new.envelope(now, relative=bool(new.number % 2))), new

    def _settled(self, copy: Copy, kind: Kind, new: Copy | None) -> None:
        if kind == "release":
            self.shadow.give_back(copy)
            return
        copy.state = "gone"
        if kind == "dead":
            self.shadow.bury(copy)
        if new is not None:
            self.shadow.store(new)

    def _queue_of_letters(self, number: int) -> str:
        return self.shadow.letters[-1 - number % len(self.shadow.letters)].queue

    def _read_letters(self, queue: str) -> list[Copy]:
        """Read all dead letters of a queue, one by one, and note their keys."""
        mine = [one for one in self.shadow.letters if one.queue == queue][::-1]
        pages: list[DeadLetter] = []
        before = None
        while page := self.run(self.broker.dead(queue, 1, before=before)):
            pages += page
            before = page[-1].key
        assert [(one.id, int(one.body)) for one in pages] == [(one.id, one.number) for one in mine]
        for letter, copy in zip(pages, mine, strict=True):
            assert letter.crashes == copy.crashes
            assert copy.key in ("", letter.key), "the key of a letter changed"
            copy.key = letter.key
        return mine

    def _hears_of_suspects(self, player: Player) -> None:
        async def check() -> None:
            news = await player.consumer.news()
            wait = any(one.suspect for one in self.shadow.ready_for(player))
            # Without order it becomes known when somebody comes upon the suspect.
            late = not self.shadow.ordered
            assert late or news.suspects is wait or any(self.shadow.ghosts.values())

        self.run(self._in_time(check))

    async def _take(self, player: Player, limit: int, order: Sequence[str] | None) -> None:
        """Fetch what is there: at once, or in time where another may have it for a moment."""
        expected = self.shadow.expected(player, limit)
        got = await player.consumer.fetch(limit, 0, order=order)
        self.shadow.handed(player, got, order)
        if self.shadow.ordered:
            assert len(got) in expected, "a batch of another size than what is there"
            return
        count = len(got)
        async with asyncio.timeout(PATIENCE):
            while count < min(expected):
                more = await player.consumer.fetch(limit - count, MOMENT, order=order)
                self.shadow.handed(player, more, order)
                count += len(more)

    async def _kill(self, player: Player) -> int:
        """Let a consumer die, where nobody can end its lease."""
        assert isinstance(self.harness, LethalHarness)
        await self._in_time(self._check_depths)
        return await self.harness.kill(player.consumer)

    async def _check_depths(self) -> None:
        depths = await self.broker.depth()
        assert set(depths) <= set(QUEUES)
        for queue in QUEUES:
            self.shadow.check_depth(queue, depths.get(queue, Depth()))

    async def _in_time(self, check: Callable[[], Awaitable[None]]) -> None:
        """See that something holds: at once, or soon where messages wander a little."""
        end = time.monotonic() + (0.0 if self.shadow.ordered else _SOON)
        while True:
            try:
                return await check()
            except AssertionError:
                if time.monotonic() >= end:
                    raise
                await asyncio.sleep(MOMENT / 10)

    async def _is_told(self, player: Player, name: str) -> None:
        told: set[str] = set()
        async with asyncio.timeout(PATIENCE):
            while name not in told:
                told |= set((await player.consumer.news()).cancelled)
                await asyncio.sleep(0)

    async def _work_off(self) -> None:
        """Leave one worker alone with what is there, some of it held by who is never seen again."""
        for player in self.players[1:]:
            await player.consumer.close()
            self.shadow.leave(player)
        first = self.players[0] if self.players and self.players[0].alive else None
        if first is not None and not self.leases:
            await self._kill(first)
        if first is not None:
            self.shadow.die(first, None)
        if self.broker.traits.clock:
            self.shadow.units += 4
            await self.harness.pass_time(4 * UNIT)
            self.shadow.promote()
        last = await self._join(QUEUES)
        self.players.append(last)
        for _ in range(len(self.shadow.copies) + 2):  # each brings one at least
            await maintain(self.broker, DeadLimits(most=0))
            patient = not self.shadow.ordered and any(one.waits for one in self.shadow.copies)
            got = await last.consumer.fetch(100, MOMENT if patient else 0)
            self.shadow.handed(last, got)
            assert not await last.consumer.settle([Done(one) for one in got])
            for copy in self.shadow.held_by(last):
                copy.state = "gone"
        waiting = [one.number for one in self.shadow.copies if one.waits]
        assert not waiting, f"never handed out: {waiting}"
        for player in self.players:
            await player.consumer.close()
        assert await maintain(self.broker) == Maintained()

        async def empty() -> None:
            assert await self.broker.depth() == {}

        await self._in_time(empty)

    async def _close(self) -> None:
        """Close what is open, also where a history has failed: others are played after it."""
        for player in self.players:
            await player.consumer.close()
        if hasattr(self, "harness"):
            await self.harness.close()
