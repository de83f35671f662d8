"""Servers with settings of their own, and faults of servers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable

from tests.faults.ledger import Acknowledged, Ended, Line, Said
from tests.faults.nemesis import Action, Nemesis
from tests.faults.producer import Some
from tests.faults.scene import Scene
from tests.servers import RedisServer, Server, Watchdog

OFTEN = (0.3, 1.0)  # seconds between faults
HEALTH = "HealthChanged"
PATIENCE = 120.0  # seconds until something that must happen has failed


class TunedRedis(RedisServer):
    """A Redis server with settings of its own.

    Args:
        watchdog: Ends it if the tests are killed.
        durable: Whether its data survives its end.
        settings: As in redis.conf, with ``_`` for ``-``.
    """

    def __init__(self, watchdog: Watchdog, *, durable: bool = True, **settings: str) -> None:
        super().__init__(watchdog, durable=durable)
        self._settings = settings

    def _command(self) -> list[str]:
        given = [(f"--{name.replace('_', '-')}", value) for name, value in self._settings.items()]
        return [*super()._command(), *(part for pair in given for part in pair)]


def kills(nemesis: Nemesis, server: Server, away: float = 0.5) -> Action:
    """Kill a server, and start it again at the latest `away` seconds later."""

    async def act(chosen: random.Random) -> bool:
        with nemesis.lasting(f"kill {server.name}"):
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(chosen.uniform(0.0, away))
            await asyncio.to_thread(server.start)
        return True

    return act


def stalls(nemesis: Nemesis, server: Server, seconds: float) -> Action:
    """Freeze a server for some seconds: connections stay, and no lease is renewed."""

    async def act(chosen: random.Random) -> bool:
        with nemesis.lasting(f"freeze {server.name}"):
            server.pause()
            try:
                await asyncio.sleep(seconds)
            finally:
                server.resume()
        return True

    return act


def commands(nemesis: Nemesis, server: RedisServer, *lines: str, seconds: float = 0.0) -> Action:
    """Send commands to a server, whose effect lasts for some seconds."""

    async def act(chosen: random.Random) -> bool:
        with nemesis.lasting("; ".join(lines)):
            await asyncio.to_thread(server.command, *lines)
            await asyncio.sleep(seconds)
        return True

    return act


def calls(nemesis: Nemesis, kind: str, function: Callable[[], object]) -> Action:
    """Call a function, such as a fault of a proxy."""

    async def act(chosen: random.Random) -> bool:
        nemesis.strike(kind)
        function()
        return True

    return act


async def serves(scene: Scene) -> None:
    """Send some tasks, and wait for the end of each."""
    await scene.sent()
    before = len(scene.ledger.of(Acknowledged))
    scene.producer(Some("quick", 20), rate=1000)
    await scene.sent()
    fresh = {line.key for line in scene.ledger.of(Acknowledged)[before:]}
    assert fresh, "nothing could be sent"

    def is_fresh(line: Ended) -> bool:
        return line.key in fresh and line.how == "returned"

    await scene.ledger.count(Ended, len(fresh), within=PATIENCE, where=is_fresh)


def is_red(line: Said) -> bool:
    """Return whether a worker reports that it is unhealthy."""
    return line.event == HEALTH and "'problems': '()'" not in line.note


async def healthy(scene: Scene) -> None:
    """Wait until no worker reports that it is unhealthy."""

    def red(lines: Iterable[Line]) -> list[Said]:
        last = {line.pid: line for line in lines if isinstance(line, Said) and line.event == HEALTH}
        return list(filter(is_red, last.values()))

    try:
        await scene.ledger.until(lambda lines: not red(lines), "all are healthy", within=PATIENCE)
    except AssertionError as error:
        error.add_note("\n".join(map(str, red(scene.ledger.refresh()))))
        raise
