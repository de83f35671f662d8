"""Redis URLs: one server, the master that Sentinel names, or a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias
from urllib.parse import SplitResult, unquote

import msgspec
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)

from aiotaskq.drivers.common.certificates import CertificateFiles, NamedFile
from aiotaskq.drivers.common.url import (
    Reader,
    host_and_port,
    masked_url,
    read_count,
    read_flag,
    read_options,
    read_seconds,
    split_url,
)
from aiotaskq.drivers.redis.sentinel import RedisSentinelMaster
from aiotaskq.drivers.redis.server import RedisServer
from aiotaskq.errors import ConfigError

_TIMEOUT = 5.0  # seconds to connect, and for the reply to a command
_SENTINEL_TIMEOUT = 1.0  # seconds for the same at a sentinel: there are other ones to ask
_PORT = 6379
_SENTINEL_PORT = 26379
_SERVICE = "mymaster"  # as in the example of Sentinel's own configuration

MAX_SHARDS = 12
"""Shards that one queue may have."""


class RedisCluster(msgspec.Struct, frozen=True, kw_only=True):
    """The address of a cluster, and how queues are spread over it.

    Attributes:
        nodes: The nodes that the URL names.
        shards: The number of shards of a queue, by queue; ``""`` stands for all others.
    """

    nodes: tuple[RedisServer, ...]
    shards: Mapping[str, int]

    @property
    def url(self) -> str:
        """The URL as it was given, without passwords."""
        return self.nodes[0].url


# --- options ------------------------------------------------------------------------------------


def _read_certificates(text: str) -> str:
    name = text.lower().removeprefix("cert_")  # CERT_NONE, as users of Celery write it
    if name not in {"none", "optional", "required"}:
        raise ValueError("none, optional or required")
    return name


def _read_shards(text: str) -> dict[str, int]:
    """Read ``3`` or ``3,mails:6``: a number for all queues, and other numbers for some."""
    shards = {"": 1}
    for part in text.split(","):
        queue, _, number = part.rpartition(":")
        shards[queue] = int(number) if number.isascii() and number.isdecimal() else 0
        if not 1 <= shards[queue] <= MAX_SHARDS:
            raise ValueError(f"a number from 1 to {MAX_SHARDS}, such as 3, or 3,mails:6")
    return shards


Readers: TypeAlias = dict[str, Reader]
Scheme: TypeAlias = tuple[type[AbstractConnection], Readers]
"""The class of redis-py that connects, and the options of such a URL."""

_COMMON: Readers = {
    "client_name": str,
    "socket_timeout": read_seconds,
    "socket_connect_timeout": read_seconds,
    "wait_replicas": read_count,
    "wait_timeout": read_seconds,
}
_DATABASE: Readers = {"db": read_count}
_TCP: Readers = {"socket_keepalive": read_flag}
_TLS: Readers = {
    "ssl_ca_certs": str,
    "ssl_ca_path": str,
    "ssl_cert_reqs": _read_certificates,
    "ssl_certfile": str,
    "ssl_check_hostname": read_flag,
    "ssl_keyfile": str,
    "ssl_password": str,
}
_SENTINEL: Readers = {"service": str, "sentinel_username": str, "sentinel_password": str}
_CLUSTER: Readers = {"shards": _read_shards}

_PLAIN = _COMMON | _TCP
_SCHEMES: dict[str, Scheme] = {
    "redis": (Connection, _PLAIN | _DATABASE),
    "rediss": (SSLConnection, _PLAIN | _DATABASE | _TLS),
    "unix": (UnixDomainSocketConnection, _COMMON | _DATABASE),
    "redis+sentinel": (Connection, _PLAIN | _DATABASE | _SENTINEL),
    "rediss+sentinel": (SSLConnection, _PLAIN | _DATABASE | _SENTINEL | _TLS),
}
_CLUSTER_SCHEMES: dict[str, Scheme] = {
    "redis+cluster": (Connection, _PLAIN | _CLUSTER),
    "rediss+cluster": (SSLConnection, _PLAIN | _CLUSTER | _TLS),
}


# --- URLs ---------------------------------------------------------------------------------------


def parse_url(url: str) -> RedisServer:
    """Read the URL of one server, or of the master that Sentinel names.

    ``redis://[[user]:password@]host[:port][/database][?option=value&...]``, the same with
    ``rediss`` for TLS, ``unix://[[user]:password@]/path/to/socket[?db=database&...]``, and
    ``redis+sentinel://[[user]:password@]host[:port],...[/database][?service=name&...]``.

    Raises:
        ConfigError: It is none of these, or has an unknown option or a wrong value.
    """
    parts, kind, options = _split(url, _SCHEMES)
    if parts.scheme.endswith("+sentinel"):
        return _sentinel_master(parts, kind, options)
    if parts.scheme == "unix":
        return _server(parts, kind, options | _path(parts))
    hosts = _hosts(parts, _PORT)
    if len(hosts) > 1:
        raise ConfigError(
            f"a {parts.scheme}:// URL names one server; for several of them there are"
            f" {parts.scheme}+sentinel:// and {parts.scheme}+cluster://"
        )
    [(host, port)] = hosts
    return _server(parts, kind, options | _database(parts, options) | {"host": host, "port": port})


def parse_cluster_url(url: str) -> RedisCluster:
    """Read ``redis+cluster://[[user]:password@]host[:port],...[?shards=number&...]``.

    Raises:
        ConfigError: It is no such URL, or has an unknown option or a wrong value.
    """
    parts, kind, options = _split(url, _CLUSTER_SCHEMES)
    if parts.path.strip("/") not in ("", "0"):
        raise ConfigError("a Redis cluster has no database but 0: leave the path out of the URL")
    shards = options.pop("shards", {"": 1})
    first = _server(parts, kind, options)
    nodes = tuple(first.at(host, port) for host, port in _hosts(parts, _PORT))
    return RedisCluster(nodes=nodes, shards=shards)


def _split(
    url: str, schemes: Mapping[str, Scheme]
) -> tuple[SplitResult, type[AbstractConnection], dict[str, Any]]:
    """Return the parts of a URL, the class that connects, and the options."""
    parts = split_url(url, system="Redis", schemes=schemes)
    kind, readers = schemes[parts.scheme]
    return parts, kind, read_options(parts, readers)


_PERSONAL = frozenset({"username", "password", "db"})  # for the server, and not for its sentinels


def _sentinel_master(
    parts: SplitResult, kind: type[AbstractConnection], given: dict[str, Any]
) -> RedisSentinelMaster:
    account = {
        name: given.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in given
    }
    service = given.pop("service", _SERVICE)
    server = _server(parts, kind, given | _database(parts, given))
    options = {name: server.options[name] for name in server.options if name not in _PERSONAL}
    options["socket_connect_timeout"] = min(_SENTINEL_TIMEOUT, options["socket_connect_timeout"])
    sentinel = RedisServer(
        url=server.url, kind=kind, options=options | account, timeout=_SENTINEL_TIMEOUT
    )
    return RedisSentinelMaster(
        **{name: getattr(server, name) for name in RedisServer.__struct_fields__},
        service=service,
        sentinels=tuple(sentinel.at(host, port) for host, port in _hosts(parts, _SENTINEL_PORT)),
    )


def _server(
    parts: SplitResult, kind: type[AbstractConnection], given: dict[str, Any]
) -> RedisServer:
    options = dict(given)
    timeout = options.pop("socket_timeout", _TIMEOUT)
    wait_replicas = options.pop("wait_replicas", 0)
    wait_timeout = options.pop("wait_timeout", 1.0)
    options.setdefault("socket_connect_timeout", timeout)
    options.setdefault("client_name", "aiotaskq")
    if parts.username:
        options["username"] = unquote(parts.username)
    if parts.password:
        options["password"] = unquote(parts.password)
    return RedisServer(
        url=masked_url(parts),
        kind=kind,
        options=options,
        timeout=timeout,
        wait_replicas=wait_replicas,
        wait_timeout=wait_timeout,
        files=_certificate_files(options),
    )


def _certificate_files(options: Mapping[str, Any]) -> CertificateFiles:
    def named(option: str) -> NamedFile | None:
        return (option, options[option]) if option in options else None

    authority = named("ssl_ca_certs")
    return CertificateFiles(
        authorities=() if authority is None else (authority,),
        folder=named("ssl_ca_path"),
        chain=named("ssl_certfile"),
        key=named("ssl_keyfile"),
        password=options.get("ssl_password", ""),
    )


def _path(parts: SplitResult) -> dict[str, Any]:
    if not parts.path or parts.netloc.rpartition("@")[2]:
        raise ConfigError("a unix:// URL names the path of a socket: unix:///run/redis/redis.sock")
    return {"path": unquote(parts.path)}


def _hosts(parts: SplitResult, port: int) -> list[tuple[str, int]]:
    _, _, places = parts.netloc.rpartition("@")
    return [host_and_port(one, port, system="Redis") for one in places.split(",")]


def _database(parts: SplitResult, options: Mapping[str, Any]) -> dict[str, Any]:
    database = unquote(parts.path).strip("/")
    if not database or "db" in options:
        return {}
    if not (database.isascii() and database.isdecimal()):
        raise ConfigError(  # not quoted: it may be a part of a password
            "the path of a Redis URL is the number of a database: redis://host:port/0"
        )
    return {"db": int(database)}
