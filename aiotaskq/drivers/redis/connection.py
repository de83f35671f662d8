"""A connection to a Redis server that is made anew when it fails, and the mapping of its errors.

Theory of operation
-------------------

A `RedisConnection` has one `RedisTransport` at a time, which any number of tasks share:

* disconnected: there is no transport, or it has failed. The next command connects.
* connecting: an attempt is under way, which all commands share. A caller that is cancelled does not
  stop it for the others.
* connected: `_transport` is live.
* closed: `close` was called, or `open` failed. Every command raises, for good.

Between any two steps the server may go away, a caller may be cancelled, or another task may call
`close`. These invariants hold:

* A failed transport is never used again, and all commands that wait on it fail with it. A new
  command uses a new transport, which may lead to another server, such as one that has taken over.
* A command is sent once. After a failure it may have taken effect, so only its caller can know
  whether it may be repeated. The one exception is a script that the server does not know: it was
  not run.
* `connects` grows with each transport. A caller that remembers it notices that the server may be
  another one, or may have lost its last writes.
* A firewall may drop a connection without a word. A command that is sent after `_QUIET` seconds
  without an answer has half of the time to be answered, so that its caller can still try again.
* A key of another type than this package gives it, which another program has written, fails every
  script that touches it. It is set aside under another name, once, and the call is made again.
* Only `ConfigError`, `UnstorableValue` and `Unavailable` leave `open`, `command` and `script`.
  `__cause__` is the client library's error.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
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
from redis.exceptions import TimeoutError as RedisTimeout

from aiotaskq.drivers.common.opening import SharedAttempt
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.redis.scripts import SET_ASIDE, RedisScript
from aiotaskq.drivers.redis.server import RedisServer
from aiotaskq.drivers.redis.transport import RedisTransport
from aiotaskq.errors import ConfigError, Unavailable
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.redis")

Word: TypeAlias = str | bytes | int | float
"""One word of a command: its name, a key or an argument."""

_QUIET = 5.0  # seconds without an answer after which a connection may be gone

_USUAL_LIMIT = 512 * 2**20  # bytes of a word
_LEAST_LIMIT = 2**20  # the lowest that a server can be set to

_REFUSALS = (AuthenticationError, AuthorizationError, NoPermissionError)
_OLDEST = (6, 2)
_SERVED_AS = {
    "standalone": "one server by itself: its URL begins with redis:// or rediss://",
    "cluster": "a node of a cluster: its URL begins with redis+cluster:// or rediss+cluster://",
    "sentinel": "a sentinel: its URL begins with redis+sentinel:// or rediss+sentinel://",
}
"""Descriptions of servers by the mode that INFO reports, each with the URLs that lead to them."""


class RedisConnection:
    """Connects when it is first used, and again after a failure.

    Args:
        server: The server to connect to.
        unavailable: The error to raise when the server cannot be reached, or refuses a command.
        full: The error to raise instead when it has no memory or disk left for more.

    Attributes:
        mode: The mode that a server has to be in.
        connects: How often it has connected.
        failed_at: When it last failed, by the event loop's clock; None if never.
        aside: How many keys were set aside.
    """

    mode: ClassVar[str] = "standalone"

    def __init__(
        self,
        server: RedisServer,
        unavailable: type[Unavailable],
        *,
        full: type[Unavailable] | None = None,
    ) -> None:
        self._server = server
        self._unavailable = unavailable
        self._full = full or unavailable
        self._transport: RedisTransport | None = None
        self._connecting = SharedAttempt[RedisTransport](_closed_error)
        self._transports: set[RedisTransport] = set()  # not closed yet
        self._closed = False
        self.connects = 0
        self.failed_at: float | None = None
        self.aside = 0

    async def open(
        self, prepare: Callable[[RedisConnection], Awaitable[None]] | None = None
    ) -> None:
        """Connect, and check that the server can be used. Closes itself where that fails.

        Args:
            prepare: Uses the connection before it counts as open.

        Raises:
            ConfigError: It refuses the user, the password or the database, is too old, or is of
                another kind than the URL says.
            Unavailable: It cannot be reached now.
        """
        try:
            await self._check()
            if prepare is not None:
                await prepare(self)
        except BaseException:
            await self.close()
            raise

    async def _check(self) -> None:
        """Connect, and check the kind and the version of the server."""
        await self._server.files.check(self._server.url)
        try:
            transport = await self.transport()
            info = await self._send(transport, ("INFO",), self._server.timeout)
        except NoPermissionError:
            return  # the version stays unknown; a server that is too old fails later
        except (RedisError, OSError) as error:
            if isinstance(error, _REFUSALS) or _is_no_database(error):
                raise ConfigError(f"{self._server.url} refuses the connection: {error}") from None
            if _is_of_another_kind(error):
                raise ConfigError(f"{self._server.url} is {_SERVED_AS['standalone']}") from None
            raise self._explain(error) from error
        self._check_server(info.decode())

    async def command(self, *words: Word, timeout: float | None = None) -> Any:
        """Run a command and return its reply.

        Args:
            words: The command and its arguments.
            timeout: Seconds to wait for the reply; None: those of the server.

        Raises:
            Unavailable: There was no reply, or it was an error.
        """
        for attempt in (1, 2):
            try:
                transport = await self.transport()
                return await self._send(transport, words, timeout or self._patience(transport))
            except (RedisError, OSError) as error:
                keys = [one for one in words[1:] if isinstance(one, str)]
                if attempt == 1 and await self._set_aside(error, keys):
                    continue
                raise self._explain(error) from error
        raise AssertionError("the second attempt returns or raises")

    async def script(self, script: RedisScript, keys: Sequence[Word], args: Sequence[Word]) -> Any:
        """Run a script and return its reply.

        Raises:
            UnstorableValue: The server takes no word of that length.
            Unavailable: There was no reply, or it was an error.
        """
        try:
            return await self._run_script(script, keys, args)
        except (RedisError, OSError) as error:
            first = error
        if not await self._set_aside(first, keys):
            await self._refuse_too_long(first, args)
            raise self._explain(first) from first
        try:
            return await self._run_script(script, keys, args)
        except (RedisError, OSError) as error:
            raise self._explain(error) from error

    async def _run_script(
        self, script: RedisScript, keys: Sequence[Word], args: Sequence[Word]
    ) -> Any:
        transport = await self.transport()
        timeout = self._patience(transport)
        waits = script.replicated and self._server.wait_replicas
        send = self._send_replicated if waits else self._send
        try:
            return await send(
                transport, ("EVALSHA", script.digest, len(keys), *keys, *args), timeout
            )
        except NoScriptError:  # the server was restarted, or its scripts were flushed
            return await send(transport, ("EVAL", script.source, len(keys), *keys, *args), timeout)

    async def _refuse_too_long(self, error: Exception, args: Sequence[Word]) -> None:
        """Raise `UnstorableValue` if a word of a call is why the server ended the connection.

        It also says so, but mostly the rest of a long word is still on its way by then, and all
        that arrives here is the end of the connection.
        """
        longest = max((len(one) for one in args if isinstance(one, bytes | str)), default=0)
        if longest < _LEAST_LIMIT or not isinstance(error, Disconnected | OSError | ResponseError):
            return
        if isinstance(error, ResponseError):
            if "bulk length" not in str(error):
                return
            self.drop()  # the server is about to end it
        limit = _USUAL_LIMIT
        with suppress(RedisError, OSError, ValueError, LookupError):  # or the user may not ask
            transport = await self.transport()
            words = ("CONFIG", "GET", "proto-max-bulk-len")
            limit = int((await self._send(transport, words, self._server.timeout))[1])
        if longest > limit:
            raise UnstorableValue(
                f"{self._server.url} takes {limit:,} bytes at most (proto-max-bulk-len), and these"
                f" are {longest:,}"
            ) from error

    async def _set_aside(self, error: Exception, keys: Sequence[Word]) -> bool:
        """Rename keys of a wrong type, where these are why a call failed; return if there were."""
        if not is_malformed_data(error):
            return False
        try:
            ending = uuid.uuid4().hex[:12]
            moved = await self._run_script(SET_ASIDE, keys, [ending])
        except (RedisError, OSError):  # the first error says more
            return False
        for key in moved:
            logger.error(
                "a key was of a type that this package never gives it, and was renamed: %r", key
            )
        self.aside += len(moved)
        return bool(moved)

    def _patience(self, transport: RedisTransport) -> float:
        """Return the seconds to wait for the reply to a command that is sent now."""
        timeout = self._server.timeout
        return timeout / 2 if transport.quiet_for > _QUIET else timeout

    def drop(self) -> None:
        """Give the present transport up, because no task waits for the next reply any more."""
        if self._transport is not None:
            self._transport.fail(Disconnected("the connection was dropped"))

    async def close(self) -> None:
        """Disconnect for good. Idempotent, never raises."""
        self._closed = True
        await self._connecting.cancel()
        for transport in list(self._transports):
            await transport.close()

    async def transport(self) -> RedisTransport:
        """Return a live transport, made now if there is none.

        Raises:
            RedisError: The server cannot be reached.
            OSError: The server cannot be reached.
        """
        transport = self._transport
        if transport is not None and transport.error is None:
            return transport
        if self._closed:
            raise _closed_error()
        return await self._connecting.result(self._connect)

    async def _send(
        self, transport: RedisTransport, words: tuple[Word, ...], timeout: float
    ) -> Any:
        packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub allows one word only
        reply = await transport.send(packed, timeout)
        if isinstance(reply, Exception):
            self._note_error(transport, reply)
            raise reply
        return reply

    async def _send_replicated(
        self, transport: RedisTransport, words: tuple[Word, ...], timeout: float
    ) -> Any:
        """Send a command that counts as done only once enough replicas have its writes."""
        wanted, within = self._server.wait_replicas, self._server.wait_timeout
        wait: tuple[Word, ...] = ("WAIT", wanted, round(within * 1000))
        # Both at once: no other command comes between a write and the WAIT for it.
        sent = [
            transport.send(hiredis.pack_command(one), timeout + within)  # type: ignore[arg-type]  # as above
            for one in (words, wait)
        ]
        reply, count = [await one for one in sent]
        for value in (reply, count):
            if isinstance(value, Exception):
                self._note_error(transport, value)
                raise value
        if count < wanted:
            raise RedisTimeout(f"{count} of {wanted} replicas have it after {within:g} s")
        return reply

    def _note_error(self, transport: RedisTransport, error: Exception) -> None:
        if isinstance(error, (ReadOnlyError, MasterDownError)) or _is_demoted(error):
            transport.fail(error)  # another server has taken over; connecting anew may find it
        if transport.error is not None:
            self.failed_at = asyncio.get_running_loop().time()

    async def _connect(self) -> RedisTransport:
        try:
            connection = await self._server.connect()
        except Exception:
            self.failed_at = asyncio.get_running_loop().time()
            raise
        transport = self._transport = RedisTransport(connection)
        self._transports.add(transport)
        transport.closed.add_done_callback(lambda _: self._transports.discard(transport))
        self.connects += 1
        return transport

    def _explain(self, error: Exception) -> Unavailable:
        kind = self._full if _is_full(error) else self._unavailable
        return kind(f"{self._server.url}: {str(error) or type(error).__name__}")

    def _check_server(self, info: str) -> None:
        facts = read_info(info)
        mode = facts.get("redis_mode", self.mode)
        if mode != self.mode and mode in _SERVED_AS:
            raise ConfigError(f"{self._server.url} is {_SERVED_AS[mode]}")
        version = facts.get("redis_version", "")
        found = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if found and found < _OLDEST:
            raise ConfigError(
                f"{self._server.url} is Redis {version}; at least"
                f" {'.'.join(map(str, _OLDEST))} is needed"
            )


def _closed_error() -> Disconnected:
    return Disconnected("the driver is closed")


def read_info(text: str) -> dict[str, str]:
    """Return the fields of the reply to INFO."""
    return dict(re.findall(r"^(\w+):(.*?)\r?$", text, re.MULTILINE))


def is_malformed_data(error: BaseException | None) -> bool:
    """Return whether a script failed because of the contents of a key, not of the server's state.

    Args:
        error: The cause of an `Unavailable` that a `RedisConnection` raised.
    """
    text = str(error)
    # The subclasses of ResponseError are about the server. Before Redis 7 all errors in a script
    # are of one kind.
    return (
        type(error) is ResponseError
        and ("WRONGTYPE" in text or "user_script" in text)
        and not re.search(r"OOM|READONLY|MISCONF|NOPERM|BUSY|NOREPLICAS|user executing", text)
    )


def _is_full(error: Exception) -> bool:
    # MISCONF: it cannot write to its disk, and is set to take no writes then.
    return isinstance(error, ResponseError) and bool(
        re.search(r"\bOOM\b|used memory > 'maxmemory'|\bMISCONF\b", str(error))
    )


def _is_demoted(error: Exception) -> bool:
    # Before Redis 7 the refusal of a write in a script is text within another error.
    return isinstance(error, ResponseError) and bool(
        re.search(r"^UNBLOCKED|-READONLY ", str(error))
    )


def _is_of_another_kind(error: Exception) -> bool:
    """Return whether a server was asked for its cluster, or as a sentinel, and is neither."""
    return isinstance(error, ResponseError) and bool(
        re.search(
            r"cluster support disabled|unknown command ['`]?SENTINEL", str(error), re.IGNORECASE
        )
    )


def _is_no_database(error: Exception) -> bool:
    return isinstance(error, ResponseError) and "DB index" in str(error)
