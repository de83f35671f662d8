"""The address of one Redis server, and the making of connections to it."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import TimeoutError as RedisTimeout

from aiotaskq.drivers.common.certificates import CertificateFiles

# redis-py would read its own version from disk for each connection, to send it to the server. Newer
# releases call the option by another name.
_UNNAMED: dict[str, Any] = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(AbstractConnection).parameters
    else {"lib_name": None, "lib_version": None}
)


class RedisServer(msgspec.Struct, frozen=True, kw_only=True):
    """The address of a server, and the options of connections to it.

    Attributes:
        url: The URL as it was given, without passwords: for banners, logs and errors.
        kind: The class of redis-py that connects.
        options: The arguments of that class.
        timeout: Seconds in which a command must be answered, or the connection is given up.
        wait_replicas: How many replicas must have a write before it counts as stored.
        wait_timeout: Seconds to wait for these replicas.
        files: The files with certificates that the URL names.
    """

    url: str
    kind: type[AbstractConnection]
    options: dict[str, Any]
    timeout: float
    wait_replicas: int = 0
    wait_timeout: float = 1.0
    files: CertificateFiles = CertificateFiles()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"  # not the options: one is the password

    def at(self, host: str, port: int) -> RedisServer:
        """Return the address of another server, with the same options."""
        return RedisServer(
            url=self.url,
            kind=self.kind,
            options={**self.options, "host": host, "port": port},
            timeout=self.timeout,
            wait_replicas=self.wait_replicas,
            wait_timeout=self.wait_timeout,
            files=self.files,
        )

    async def connect(self) -> AbstractConnection:
        """Return a connection that is connected and authenticated.

        Raises:
            RedisError: It failed.
            OSError: It failed.
        """
        # `RedisTransport` keeps the deadlines: one timer for many commands. RESP2 has all that is
        # needed, and spares the notifications that redis-py asks for with RESP3.
        connection = self.kind(**self.options, **_UNNAMED, socket_timeout=None, protocol=2)
        try:
            # redis-py limits the time to connect the socket, but not that of the first commands.
            async with asyncio.timeout(2 * self.options["socket_connect_timeout"]):
                await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise RedisTimeout("no answer to the greeting in time") from None
            raise
        return connection


async def ask(connection: AbstractConnection, *words: str, within: float) -> Any:
    """Send one command on a connection that nothing else uses, and return the reply.

    Raises:
        RedisError: The reply is an error, or there is none in time.
        OSError: The connection failed.
    """
    try:
        async with asyncio.timeout(within):
            await connection.send_command(*words)
            return await connection.read_response()
    except TimeoutError:
        raise RedisTimeout(f"no answer to {words[0]} in time") from None
