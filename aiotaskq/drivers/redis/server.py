"""Where one server is, how it is talked to, and the making of a connection."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import TimeoutError as Silent

# redis-py would look its own version up on disk for each connection, to tell the server. Newer
# releases are told so by another word.
_UNNAMED: dict[str, Any] = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(AbstractConnection).parameters
    else {"lib_name": None, "lib_version": None}
)


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server is, and how it is talked to.

    Attributes:
        url: As it was given, but for the password: for banners, logs and errors.
        kind: What connects to it.
        options: What `kind` is made with.
        timeout: Seconds in which a command is answered, or the connection is given up.
        wait_replicas: How many replicas are to have what is stored before it counts as stored.
        wait_timeout: Seconds that they may take.
    """

    url: str
    kind: type[AbstractConnection]
    options: dict[str, Any]
    timeout: float
    wait_replicas: int = 0
    wait_timeout: float = 1.0

    def at(self, host: str, port: int) -> Address:
        """Return the address of another server that is talked to in the same way."""
        return Address(
            url=self.url,
            kind=self.kind,
            options={**self.options, "host": host, "port": port},
            timeout=self.timeout,
            wait_replicas=self.wait_replicas,
            wait_timeout=self.wait_timeout,
        )

    async def connect(self) -> AbstractConnection:
        """Return a connection that is connected and authenticated.

        Raises:
            RedisError: It failed.
            OSError: It failed.
        """
        # Deadlines are kept by those who use it: one timer for many commands. RESP2 is all that
        # is needed, and spares the notifications that redis-py asks for with RESP3.
        connection = self.kind(**self.options, **_UNNAMED, socket_timeout=None, protocol=2)
        try:
            # redis-py limits the time for the socket, not for what is said on it at first.
            async with asyncio.timeout(2 * self.options["socket_connect_timeout"]):
                await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise Silent("no answer to the greeting in time") from None
            raise
        return connection


async def ask(connection: AbstractConnection, *words: str, within: float) -> Any:
    """Say one thing on a connection that nobody else uses, and return the answer.

    Raises:
        RedisError: The answer is an error, or there is none in time.
        OSError: The connection failed.
    """
    try:
        async with asyncio.timeout(within):
            await connection.send_command(*words)
            return await connection.read_response()
    except TimeoutError:
        raise Silent(f"no answer to {words[0]} in time") from None
