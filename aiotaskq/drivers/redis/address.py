"""Redis URLs: what they may say, and how they are shown."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import msgspec
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)

from aiotaskq.errors import ConfigError

# redis-py would look its own version up on disk for each connection, to tell the server. Newer
# releases are told so by another word.
_UNNAMED: dict[str, Any] = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(AbstractConnection).parameters
    else {"lib_name": None, "lib_version": None}
)

_TIMEOUT = 5.0  # seconds for connecting, and for a command to be answered


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server is, and how it is talked to.

    Attributes:
        url: As it was given, but for the password: for banners, logs and errors.
        kind: What connects to it.
        options: What `kind` is made with.
        timeout: Seconds in which a command is answered, or the connection is given up.
    """

    url: str
    kind: type[AbstractConnection]
    options: dict[str, Any]
    timeout: float

    def connection(self) -> AbstractConnection:
        """Return a new connection, not connected yet."""
        # Deadlines are kept by those who use it: one timer for many commands. RESP2 is all that
        # is needed, and spares the notifications that redis-py asks for with RESP3.
        return self.kind(**self.options, **_UNNAMED, socket_timeout=None, protocol=2)


def _flag(text: str) -> bool:
    if text.lower() not in {"true", "false", "1", "0", "yes", "no"}:
        raise ValueError(text)
    return text.lower() in {"true", "1", "yes"}


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.0 < seconds < 1e6:
        raise ValueError(text)
    return seconds


def _certificates(text: str) -> str:
    name = text.lower().removeprefix("cert_")  # CERT_NONE, as Celery's users write it
    if name not in {"none", "optional", "required"}:
        raise ValueError(text)
    return name


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "db": int,
    "client_name": str,
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
}
_TCP: dict[str, Callable[[str], Any]] = {"socket_keepalive": _flag}
_TLS: dict[str, Callable[[str], Any]] = {
    "ssl_ca_certs": str,
    "ssl_ca_path": str,
    "ssl_cert_reqs": _certificates,
    "ssl_certfile": str,
    "ssl_check_hostname": _flag,
    "ssl_keyfile": str,
    "ssl_password": str,
}
_SCHEMES: dict[str, tuple[type[AbstractConnection], dict[str, Callable[[str], Any]]]] = {
    "redis": (Connection, _OPTIONS | _TCP),
    "rediss": (SSLConnection, _OPTIONS | _TCP | _TLS),
    "unix": (UnixDomainSocketConnection, _OPTIONS),
}
_SECRET = frozenset({"ssl_password"})


def parse(url: str) -> Address:
    """Read a URL.

    ``redis://[[user]:password@]host[:port][/database][?option=value&...]``, the same with
    ``rediss`` for TLS, and ``unix://[[user]:password@]/path/to/socket[?db=database&...]``.

    Raises:
        ConfigError: It is none of these, or has an option that there is not.
    """
    parts = _split(url)
    kind, known = _SCHEMES[parts.scheme]
    options = _query(parts, known)
    timeout = options.pop("socket_timeout", _TIMEOUT)
    options.setdefault("socket_connect_timeout", timeout)
    options.setdefault("client_name", "aiotaskq")
    if parts.username:
        options["username"] = unquote(parts.username)
    if parts.password:
        options["password"] = unquote(parts.password)
    options |= _path(parts) if parts.scheme == "unix" else _place(parts, options)
    return Address(url=_masked(parts), kind=kind, options=options, timeout=timeout)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is no number
    except ValueError as error:
        raise ConfigError(f"not a Redis URL: {error}") from None
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"not a Redis URL: it begins with {parts.scheme or 'nothing'}://, and may begin with"
            f" {', '.join(f'{scheme}://' for scheme in _SCHEMES)}"
        )
    return parts


def _query(parts: SplitResult, known: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
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


def _place(parts: SplitResult, options: dict[str, Any]) -> dict[str, Any]:
    place: dict[str, Any] = {
        "host": unquote(parts.hostname or "localhost"),
        "port": parts.port or 6379,
    }
    database = unquote(parts.path).strip("/")
    if database and "db" not in options:
        if not database.isdecimal():
            raise ConfigError(
                f"{database!r} is not the number of a Redis database: redis://host:port/0"
            )
        place["db"] = int(database)
    return place


def _masked(parts: SplitResult) -> str:
    account, at, place = parts.netloc.rpartition("@")
    user, colon, _ = account.partition(":")
    query = "&".join(
        f"{name}={'***' if name in _SECRET else quote(text)}"
        for name, text in parse_qsl(parts.query, keep_blank_values=True)
    )
    netloc = f"{user}{':***' if colon else ''}{at}{place}"
    return f"{parts.scheme}://{netloc}{parts.path}{'?' if query else ''}{query}"
