"""What any number of tasks say to the server, over one connection at a time.

It connects when it is first used. A connection that does not answer in time, or fails in any other
way, is given up with all that waits on it, and the next command makes a new one.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import hiredis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import TimeoutError as Silent

from aiotaskq.drivers.redis.scripts import Script
from aiotaskq.drivers.redis.server import Address
from aiotaskq.drivers.redis.wire import Wire
from aiotaskq.errors import ConfigError, Unavailable

logger = logging.getLogger("aiotaskq.redis")

Word: TypeAlias = str | bytes | int | float

_REFUSALS = (AuthenticationError, AuthorizationError, NoPermissionError)
_OLDEST = (6, 2)
_SERVED_AS = {
    "standalone": "one server by itself: its URL begins with redis:// or rediss://",
    "cluster": "a node of a cluster: its URL begins with redis+cluster:// or rediss+cluster://",
    "sentinel": "a sentinel: its URL begins with redis+sentinel:// or rediss+sentinel://",
}
"""What to call a server, by what it says its mode is."""


class Link:
    """Connects when it is first used, and again after a failure.

    Args:
        address: Where to.
        unavailable: What to raise when the server cannot be reached, or refuses.
        full: What to raise instead when it takes nothing more, as it has no memory or disk left.

    Attributes:
        mode: What a server has to be.
        connects: How often it has connected.
        failed_at: When it last failed, by the event loop's clock; None if never.
    """

    mode: ClassVar[str] = "standalone"

    def __init__(
        self,
        address: Address,
        unavailable: type[Unavailable],
        *,
        full: type[Unavailable] | None = None,
    ) -> None:
        self._address = address
        self._unavailable = unavailable
        self._full = full or unavailable
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[Wire] | None = None
        self._wires: set[Wire] = set()
        self._closed = False
        self.connects = 0
        self.failed_at: float | None = None

    async def open(self) -> None:
        """Connect, and see that the server will do.

        Raises:
            ConfigError: It refuses the user, the password or the database, is too old, or is of
                another kind than the URL says.
            Unavailable: It cannot be reached now.
        """
        try:
            wire = await self.wire()
            info = await self._send(wire, ("INFO",), self._address.timeout)
        except NoPermissionError:
            return  # a server whose version we may not know; what it lacks, its errors tell
        except (RedisError, OSError) as error:
            if isinstance(error, _REFUSALS) or _is_no_database(error):
                raise ConfigError(f"{self._address.url} refuses the connection: {error}") from None
            if _is_of_another_kind(error):
                raise ConfigError(f"{self._address.url} is {_SERVED_AS['standalone']}") from None
            raise self._explain(error) from error
        self._check_server(info.decode())

    async def command(self, *words: Word, patience: float | None = None) -> Any:
        """Run a command and return its reply.

        Args:
            words: The command and its arguments.
            patience: Seconds to wait for the reply, where the address's are not enough.

        Raises:
            Unavailable: There was no reply, or it was an error.
        """
        try:
            return await self._send(await self.wire(), words, patience or self._address.timeout)
        except (RedisError, OSError) as error:
            raise self._explain(error) from error

    async def script(self, script: Script, keys: Sequence[Word], args: Sequence[Word]) -> Any:
        """Run a script and return its reply.

        Raises:
            Unavailable: There was no reply, or it was an error.
        """
        patience = self._address.timeout
        try:
            wire = await self.wire()
            send = self._send_firm if script.firm and self._address.wait_replicas else self._send
            try:
                return await send(
                    wire, ("EVALSHA", script.digest, len(keys), *keys, *args), patience
                )
            except NoScriptError:  # the server restarted, or was told to forget
                return await send(wire, ("EVAL", script.source, len(keys), *keys, *args), patience)
        except (RedisError, OSError) as error:
            raise self._explain(error) from error

    def drop(self) -> None:
        """Give the present connection up, as something is on its way that nobody wants."""
        if self._wire is not None:
            self._wire.fail(Disconnected("the connection was dropped"))

    async def close(self) -> None:
        """Disconnect for good. Idempotent, never raises."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        for wire in list(self._wires):
            await wire.close()

    async def _send(self, wire: Wire, words: tuple[Word, ...], patience: float) -> Any:
        packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub: one word
        reply = await wire.send(packed, patience)
        if isinstance(reply, Exception):
            self._note(wire, reply)
            raise reply
        return reply

    async def _send_firm(self, wire: Wire, words: tuple[Word, ...], patience: float) -> Any:
        """Send a command that counts only once enough replicas have what it wrote."""
        wanted, within = self._address.wait_replicas, self._address.wait_timeout
        asked: tuple[Word, ...] = ("WAIT", wanted, round(within * 1000))
        sent = [
            wire.send(hiredis.pack_command(one), patience + within)  # type: ignore[arg-type]  # as above
            for one in (words, asked)
        ]
        reply, count = [await one for one in sent]
        for value in (reply, count):
            if isinstance(value, Exception):
                self._note(wire, value)
                raise value
        if count < wanted:
            raise Silent(f"{count} of {wanted} replicas have it after {within:g} s")
        return reply

    def _note(self, wire: Wire, error: Exception) -> None:
        if isinstance(error, (ReadOnlyError, MasterDownError)) or _is_demoted(error):
            wire.fail(error)  # another server has taken over; the address may lead there now
        if wire.error is not None:
            self.failed_at = asyncio.get_running_loop().time()

    async def wire(self) -> Wire:
        """Return a live connection, made now if there is none.

        Raises:
            RedisError: There is none.
            OSError: There is none.
        """
        wire = self._wire
        if wire is not None and wire.error is None:
            return wire
        if self._closed:
            raise Disconnected("the driver is closed")
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        connecting = self._connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if connecting.cancelled():  # by `close`, not by whoever cancels this task
                raise Disconnected("the driver is closed") from None
            raise

    async def _connect(self) -> Wire:
        connection = await self._address.connect()
        wire = self._wire = Wire(connection)
        self._wires.add(wire)
        wire.closed.add_done_callback(lambda _: self._wires.discard(wire))
        self.connects += 1
        return wire

    def _connected(self, task: asyncio.Task[Wire]) -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is not None:
            self.failed_at = task.get_loop().time()

    def _explain(self, error: Exception) -> Unavailable:
        kind = self._full if _is_full(error) else self._unavailable
        return kind(f"{self._address.url}: {str(error) or type(error).__name__}")

    def _check_server(self, info: str) -> None:
        facts = read_info(info)
        mode = facts.get("redis_mode", self.mode)
        if mode != self.mode and mode in _SERVED_AS:
            raise ConfigError(f"{self._address.url} is {_SERVED_AS[mode]}")
        version = facts.get("redis_version", "")
        found = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if found and found < _OLDEST:
            raise ConfigError(
                f"{self._address.url} is Redis {version}; at least"
                f" {'.'.join(map(str, _OLDEST))} is needed"
            )


def read_info(text: str) -> dict[str, str]:
    """Return what the server answers to INFO, by name."""
    return dict(re.findall(r"^(\w+):(.*?)\r?$", text, re.MULTILINE))


def is_odd_data(error: BaseException | None) -> bool:
    """Tell whether a script failed over what it found in a key, and not over the server's state.

    Args:
        error: The cause of an `Unavailable` that a `Link` raised.
    """
    text = str(error)
    # A subclass tells of the server. Before Redis 7 a script's errors are all of one kind.
    return (
        type(error) is ResponseError
        and ("WRONGTYPE" in text or "user_script" in text)
        and not re.search(r"OOM|READONLY|MISCONF|NOPERM|BUSY|NOREPLICAS", text)
    )


def _is_full(error: Exception) -> bool:
    # MISCONF: it cannot write to disk, and was told to take nothing then.
    return isinstance(error, ResponseError) and bool(
        re.search(r"\bOOM\b|used memory > 'maxmemory'|\bMISCONF\b", str(error))
    )


def _is_demoted(error: Exception) -> bool:
    # Before Redis 7 what a script was refused comes as text within another error.
    return isinstance(error, ResponseError) and bool(
        re.search(r"^UNBLOCKED|-READONLY ", str(error))
    )


def _is_of_another_kind(error: Exception) -> bool:
    """Tell whether what was asked where the cluster, or the master, is was no server to ask."""
    return isinstance(error, ResponseError) and bool(
        re.search(
            r"cluster support disabled|unknown command ['`]?SENTINEL", str(error), re.IGNORECASE
        )
    )


def _is_no_database(error: Exception) -> bool:
    return isinstance(error, ResponseError) and "DB index" in str(error)
