"""RabbitMQ URLs: their options, and the address of a server that they give."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import SplitResult, unquote

from aiotaskq.drivers.common.url import (
    Reader,
    host_and_port,
    masked_url,
    one_of,
    read_flag,
    read_options,
    read_seconds,
    split_url,
)
from aiotaskq.errors import ConfigError

_TIMEOUT = 10.0  # seconds that an answer may take
# Seconds. The connection of a worker is its lease: half-open ones must end about as soon as leases.
_HEARTBEAT = 15
_MOST_HEARTBEAT = 65534  # aiormq takes a larger one for none


@dataclass(frozen=True, kw_only=True)
class RabbitAddress:
    """The address of a server, and the options of connections to it.

    Attributes:
        url: The URL for people: without the password.
        hosts: Names and ports of the nodes of one cluster; the first that answers is used.
        queue_type: The type of queues that are made: ``quorum`` or ``classic``.
        heartbeat: Seconds; a connection is given up after three times that without a sign of life.
        timeout: Seconds that an answer may take.
        connect_timeout: Seconds that connecting may take.
        mechanism: AMQP's name of the way to authenticate: ``PLAIN`` or ``EXTERNAL``.
    """

    url: str
    hosts: tuple[tuple[str, int], ...]
    virtual_host: str
    mechanism: str
    user: str = field(repr=False)
    password: str = field(repr=False)
    queue_type: str = "quorum"
    heartbeat: int = _HEARTBEAT
    timeout: float = _TIMEOUT
    connect_timeout: float = _TIMEOUT
    connection_name: str = "aiotaskq"
    tls: tuple[tuple[str, Any], ...] | None = None

    @cached_property
    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS context of connections; None without TLS. Reading it opens files.

        Raises:
            ConfigError: A certificate or a key cannot be read.
        """
        if self.tls is None:
            return None
        options = dict(self.tls)
        try:
            context = ssl.create_default_context(cafile=options.get("cafile"))
            if "certfile" in options:
                context.load_cert_chain(options["certfile"], options.get("keyfile"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.url}: a certificate cannot be read: {error}") from None
        if not options.get("verify", True):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _read_heartbeat(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= _MOST_HEARTBEAT):
        raise ValueError(f"whole seconds, from 1 to {_MOST_HEARTBEAT}")
    return int(text)


_OPTIONS: dict[str, Reader] = {
    "queue_type": one_of("quorum", "classic"),
    "heartbeat": _read_heartbeat,
    "timeout": read_seconds,
    "connect_timeout": read_seconds,
    "connection_name": str,
}
_TLS_OPTIONS: dict[str, Reader] = {
    "cafile": str,
    "certfile": str,
    "keyfile": str,
    "verify": read_flag,
}
_SEVERAL = re.compile(r"[;,]\s*amqps?://", re.IGNORECASE)
_PORTS = {"amqp": 5672, "amqps": 5671}


def parse_url(url: str) -> RabbitAddress:
    """Read a URL.

    ``amqp://[user[:password]@]host[:port][,host[:port]...][/virtual host][?option=value&...]``, the
    same with ``amqps`` for TLS. An empty virtual host is ``/``.

    Raises:
        ConfigError: It is not such a URL, or has an unknown option.
    """
    if _SEVERAL.search(url):
        raise ConfigError(
            "not a RabbitMQ URL, but several: name all hosts in one, as in"
            " amqp://user:password@host1:5672,host2:5672/vhost"
        )
    parts = split_url(url, system="RabbitMQ", schemes=_PORTS)
    hosts = _hosts(parts)
    readers = _OPTIONS | (_TLS_OPTIONS if parts.scheme == "amqps" else {})
    options = read_options(parts, readers)
    tls = None
    if parts.scheme == "amqps":
        tls = tuple((name, options.pop(name)) for name in _TLS_OPTIONS if name in options)
    external = parts.scheme == "amqps" and parts.username is None and "certfile" in dict(tls or ())
    return RabbitAddress(
        url=masked_url(parts),
        hosts=hosts,
        virtual_host=unquote(parts.path.removeprefix("/")) or "/",
        # Without a user, the client's certificate authenticates it.
        mechanism="EXTERNAL" if external else "PLAIN",
        user=unquote(parts.username or "guest"),
        password=unquote(parts.password or "guest"),
        tls=tls,
        **options,
    )


def _hosts(parts: SplitResult) -> tuple[tuple[str, int], ...]:
    places = parts.netloc.rpartition("@")[2].split(",")
    if len(places) > 1 and not all(places):
        raise ConfigError("not a RabbitMQ URL: a host is missing before or behind a comma")
    return tuple(host_and_port(one, _PORTS[parts.scheme], system="RabbitMQ") for one in places)
