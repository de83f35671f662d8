"""RabbitMQ URLs: what they may say, and how they are shown."""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from aiotaskq.errors import ConfigError

_TIMEOUT = 10.0  # seconds that an answer may take
# Seconds. The connection of a worker is its lease, and half-open ones are to end about as soon.
_HEARTBEAT = 15
_MOST_HEARTBEAT = 65534  # more is none to aiormq


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is, and how it is spoken to.

    Attributes:
        url: As it may be shown: without the password.
        queue_type: Of queues that are made: ``quorum`` or ``classic``.
        heartbeat: Seconds; a connection is given up after three times that without a sign of life.
        timeout: Seconds that an answer may take.
        connect_timeout: Seconds that connecting may take.
        mechanism: By which the server is told who we are: ``PLAIN`` or ``EXTERNAL``.
    """

    url: str
    host: str
    port: int
    virtual_host: str
    mechanism: str
    user: str
    password: str = field(repr=False)
    queue_type: str = "quorum"
    heartbeat: int = _HEARTBEAT
    timeout: float = _TIMEOUT
    connect_timeout: float = _TIMEOUT
    connection_name: str = "aiotaskq"
    tls: tuple[tuple[str, Any], ...] | None = None

    @cached_property
    def ssl_context(self) -> ssl.SSLContext | None:
        """How TLS is spoken; None without it.

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


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError(text)
    return seconds


def _heartbeat(text: str) -> int:
    seconds = int(text)
    if not 1 <= seconds <= _MOST_HEARTBEAT:
        raise ValueError(text)
    return seconds


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text.lower() not in names:
            raise ValueError(text)
        return text.lower()

    return check


def _flag(text: str) -> bool:
    return _one_of("0", "1", "false", "true", "no", "yes")(text) in ("1", "true", "yes")


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "queue_type": _one_of("quorum", "classic"),
    "heartbeat": _heartbeat,
    "timeout": _seconds,
    "connect_timeout": _seconds,
    "connection_name": str,
}
_TLS: dict[str, Callable[[str], Any]] = {
    "cafile": str,
    "certfile": str,
    "keyfile": str,
    "verify": _flag,
}
_PORTS = {"amqp": 5672, "amqps": 5671}


def parse(url: str) -> Address:
    """Read a URL.

    ``amqp://[user[:password]@]host[:port][/virtual host][?option=value&...]``, the same with
    ``amqps`` for TLS. An empty virtual host is ``/``.

    Raises:
        ConfigError: It is none of these, or has an option that there is not.
    """
    parts = _split(url)
    known = _OPTIONS | (_TLS if parts.scheme == "amqps" else {})
    options = _query(parts, known)
    tls = None
    if parts.scheme == "amqps":
        tls = tuple((name, options.pop(name)) for name in _TLS if name in options)
    external = parts.scheme == "amqps" and parts.username is None and "certfile" in dict(tls or ())
    return Address(
        url=_masked(parts),
        host=unquote(parts.hostname or "localhost"),
        port=parts.port or _PORTS[parts.scheme],
        virtual_host=unquote(parts.path.removeprefix("/")) or "/",
        # Without a user, a client's certificate may be all that it has to show.
        mechanism="EXTERNAL" if external else "PLAIN",
        user=unquote(parts.username or "guest"),
        password=unquote(parts.password or "guest"),
        tls=tls,
        **options,
    )


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:  # which may show all of it
        raise ConfigError("not a RabbitMQ URL: it has odd characters, or brackets, in it") from None
    if parts.scheme not in _PORTS:
        raise ConfigError(
            f"not a RabbitMQ URL: it begins with {parts.scheme or 'nothing'}://, and may begin"
            " with amqp:// or amqps://"
        )
    # A password with one of these in it ends the URL too early: no error may show the rest of it.
    if any("@" in one for one in (parts.path, parts.query, parts.fragment)):
        raise ConfigError(
            "not a RabbitMQ URL: the user and the password, before the @, are quoted: / is %2F,"
            " ? is %3F and # is %23 there; and behind the host an @ is %40"
        )
    try:
        _ = parts.port
    except ValueError:  # which would show what may be a part of a password
        raise ConfigError(
            "not a RabbitMQ URL: it names a host as host:port, with a port from 0 to 65535"
        ) from None
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
            raise ConfigError(f"{text!r} is not a value of the option {name!r}") from None
    return options


def _masked(parts: SplitResult) -> str:
    account, at, place = parts.netloc.rpartition("@")
    user, colon, _ = account.partition(":")
    query = "&".join(
        f"{name}={quote(text)}" for name, text in parse_qsl(parts.query, keep_blank_values=True)
    )
    netloc = f"{user}{':***' if colon else ''}{at}{place}"
    return f"{parts.scheme}://{netloc}{parts.path}{'?' if query else ''}{query}"
