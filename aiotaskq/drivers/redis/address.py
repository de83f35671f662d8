"""Redis URLs: what they may say, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import msgspec
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)

from aiotaskq.drivers.redis.sentinel import SentinelAddress
from aiotaskq.drivers.redis.server import Address
from aiotaskq.errors import ConfigError

_TIMEOUT = 5.0  # seconds for connecting, and for a command to be answered
_SENTINEL_TIMEOUT = 1.0  # seconds for the same of a sentinel, of which there are others
_SENTINEL_PORT = 26379
_SERVICE = "mymaster"  # as the example in Sentinel's own configuration has it

Readers: TypeAlias = dict[str, Callable[[str], Any]]


class ClusterAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a cluster is, and how it is talked to.

    Attributes:
        nodes: Those that were named, with how each is talked to.
        shards: Over how many slots a queue is spread, by queue; ``""`` for all others.
    """

    nodes: tuple[Address, ...]
    shards: Mapping[str, int]

    @property
    def url(self) -> str:
        """As it was given, but for the password."""
        return self.nodes[0].url


def _flag(text: str) -> bool:
    if text.lower() not in {"true", "false", "1", "0", "yes", "no"}:
        raise ValueError(text)
    return text.lower() in {"true", "1", "yes"}


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.0 < seconds < 1e6:
        raise ValueError(text)
    return seconds


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _certificates(text: str) -> str:
    name = text.lower().removeprefix("cert_")  # CERT_NONE, as Celery's users write it
    if name not in {"none", "optional", "required"}:
        raise ValueError(text)
    return name


def _shards(text: str) -> dict[str, int]:
    """Read ``3`` or ``3,mails:6``: a number for all queues, and others for some."""
    found = {"": 1}
    for part in text.split(","):
        queue, _, number = part.rpartition(":")
        found[queue] = int(number)
        if not 1 <= found[queue] <= 12:
            raise ValueError(text)
    return found


_COMMON: Readers = {
    "client_name": str,
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
    "wait_replicas": _count,
    "wait_timeout": _seconds,
}
_DATABASE: Readers = {"db": int}
_TCP: Readers = {"socket_keepalive": _flag}
_TLS: Readers = {
    "ssl_ca_certs": str,
    "ssl_ca_path": str,
    "ssl_cert_reqs": _certificates,
    "ssl_certfile": str,
    "ssl_check_hostname": _flag,
    "ssl_keyfile": str,
    "ssl_password": str,
}
_SENTINEL: Readers = {"service": str, "sentinel_username": str, "sentinel_password": str}
_CLUSTER: Readers = {"shards": _shards}
_SECRET = frozenset({"ssl_password", "sentinel_password"})

_PLAIN = _COMMON | _TCP
_SCHEMES: dict[str, tuple[type[AbstractConnection], Readers]] = {
    "redis": (Connection, _PLAIN | _DATABASE),
    "rediss": (SSLConnection, _PLAIN | _DATABASE | _TLS),
    "unix": (UnixDomainSocketConnection, _COMMON | _DATABASE),
    "redis+sentinel": (Connection, _PLAIN | _DATABASE | _SENTINEL),
    "rediss+sentinel": (SSLConnection, _PLAIN | _DATABASE | _SENTINEL | _TLS),
}
_CLUSTERS: dict[str, tuple[type[AbstractConnection], Readers]] = {
    "redis+cluster": (Connection, _PLAIN | _CLUSTER),
    "rediss+cluster": (SSLConnection, _PLAIN | _CLUSTER | _TLS),
}


def parse(url: str) -> Address:
    """Read the URL of what is one server at a time.

    ``redis://[[user]:password@]host[:port][/database][?option=value&...]``, the same with
    ``rediss`` for TLS, ``unix://[[user]:password@]/path/to/socket[?db=database&...]``, and
    ``redis+sentinel://[[user]:password@]host[:port],...[/database][?service=name&...]``.

    Raises:
        ConfigError: It is none of these, or has an option that there is not.
    """
    parts = _split(url, _SCHEMES)
    kind, known = _SCHEMES[parts.scheme]
    given = _query(parts, known)
    if parts.scheme.endswith("+sentinel"):
        return _sentinel(parts, kind, given)
    if parts.scheme == "unix":
        return _address(parts, kind, given | _path(parts))
    hosts = _hosts(parts, 6379)
    if len(hosts) > 1:
        raise ConfigError(
            f"a {parts.scheme}:// URL names one server; for several of them there are"
            f" {parts.scheme}+sentinel:// and {parts.scheme}+cluster://"
        )
    [(host, port)] = hosts
    return _address(parts, kind, given | _database(parts, given) | {"host": host, "port": port})


def parse_cluster(url: str) -> ClusterAddress:
    """Read ``redis+cluster://[[user]:password@]host[:port],...[?shards=number&...]``.

    Raises:
        ConfigError: It is no such URL, or has an option that there is not.
    """
    parts = _split(url, _CLUSTERS)
    kind, known = _CLUSTERS[parts.scheme]
    given = _query(parts, known)
    if parts.path.strip("/") not in ("", "0"):
        raise ConfigError("a Redis cluster has no database but 0: leave the path out of the URL")
    shards = given.pop("shards", {"": 1})
    first = _address(parts, kind, given)
    nodes = tuple(first.at(host, port) for host, port in _hosts(parts, 6379))
    return ClusterAddress(nodes=nodes, shards=shards)


def _sentinel(
    parts: SplitResult, kind: type[AbstractConnection], given: dict[str, Any]
) -> SentinelAddress:
    account = {
        name: given.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in given
    }
    service = given.pop("service", _SERVICE)
    server = _address(parts, kind, given | _database(parts, given))
    options = {name: server.options[name] for name in server.options if name not in _PERSONAL}
    options["socket_connect_timeout"] = min(_SENTINEL_TIMEOUT, options["socket_connect_timeout"])
    asked = Address(url=server.url, kind=kind, options=options | account, timeout=_SENTINEL_TIMEOUT)
    return SentinelAddress(
        **{name: getattr(server, name) for name in Address.__struct_fields__},
        service=service,
        sentinels=tuple(asked.at(host, port) for host, port in _hosts(parts, _SENTINEL_PORT)),
    )


_PERSONAL = frozenset({"username", "password", "db"})  # of the server, and not of its sentinels


def _address(parts: SplitResult, kind: type[AbstractConnection], given: dict[str, Any]) -> Address:
    options = dict(given)
    timeout = options.pop("socket_timeout", _TIMEOUT)
    replicas = options.pop("wait_replicas", 0)
    patience = options.pop("wait_timeout", 1.0)
    options.setdefault("socket_connect_timeout", timeout)
    options.setdefault("client_name", "aiotaskq")
    if parts.username:
        options["username"] = unquote(parts.username)
    if parts.password:
        options["password"] = unquote(parts.password)
    return Address(
        url=_masked(parts),
        kind=kind,
        options=options,
        timeout=timeout,
        wait_replicas=replicas,
        wait_timeout=patience,
    )


def _split(
    url: str, schemes: Mapping[str, tuple[type[AbstractConnection], Readers]]
) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:  # which may show all of it
        raise ConfigError("not a Redis URL: it has odd characters, or brackets, in it") from None
    if parts.scheme not in schemes:
        raise ConfigError(
            f"not a Redis URL: it begins with {parts.scheme or 'nothing'}://, and may begin with"
            f" {', '.join(f'{scheme}://' for scheme in schemes)}"
        )
    _see_that_it_is_quoted(parts)
    return parts


def _see_that_it_is_quoted(parts: SplitResult) -> None:
    """Refuse a URL that ends amid a password, of which no error may then show the rest."""
    path = "" if parts.scheme == "unix" else parts.path
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if any("@" in one for one in (path, parts.fragment, *names)):
        raise ConfigError(
            "not a Redis URL: the user and the password, before the @, are quoted:"
            " / is %2F, ? is %3F and # is %23 there"
        )


def _query(parts: SplitResult, known: Readers) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            raise ConfigError(
                f"a {parts.scheme}:// URL has no option {name!r}; it may have"
                f" {', '.join(sorted(known))}"
            )
        try:
            options[name] = known[name](text)
        except ValueError:
            shown = "***" if name in _SECRET else repr(text)
            raise ConfigError(f"{shown} is not a value of the option {name!r}") from None
    return options


def _path(parts: SplitResult) -> dict[str, Any]:
    if not parts.path:
        raise ConfigError("a unix:// URL names the path of a socket: unix:///run/redis/redis.sock")
    return {"path": unquote(parts.path)}


def _hosts(parts: SplitResult, port: int) -> list[tuple[str, int]]:
    _, _, named = parts.netloc.rpartition("@")
    hosts: list[tuple[str, int]] = []
    for one in named.split(","):
        try:
            place = urlsplit(f"redis://{one}")
            hosts.append((unquote(place.hostname or "localhost"), place.port or port))
        except ValueError:  # which would show what may be a part of a password
            raise ConfigError(
                "not a Redis URL: it names hosts as host:port, with a port from 1 to 65535"
            ) from None
    return hosts


def _database(parts: SplitResult, given: dict[str, Any]) -> dict[str, Any]:
    database = unquote(parts.path).strip("/")
    if not database or "db" in given:
        return {}
    if not database.isdecimal():
        raise ConfigError(
            f"{database!r} is not the number of a Redis database: redis://host:port/0"
        )
    return {"db": int(database)}


def _masked(parts: SplitResult) -> str:
    account, at, place = parts.netloc.rpartition("@")
    user, colon, _ = account.partition(":")
    query = "&".join(
        f"{name}={'***' if name in _SECRET else quote(text)}"
        for name, text in parse_qsl(parts.query, keep_blank_values=True)
    )
    netloc = f"{user}{':***' if colon else ''}{at}{place}"
    return f"{parts.scheme}://{netloc}{parts.path}{'?' if query else ''}{query}"
