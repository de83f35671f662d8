"""Where a PostgreSQL server is: URLs as Celery, SQLAlchemy and libpq write them."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

import msgspec

from aiotaskq.errors import ConfigError

_URL = re.compile(
    r"""
    (?:db\+)?                                   # Celery's mark for a database
    (?:postgresql|postgres)
    (?:\+(?P<client>\w+))?                      # SQLAlchemy's client library
    ://
    (?:(?P<login>.*)@)?                         # greedy: a password may hold an unquoted @
    (?P<place>[^/?@]*(?:/[^?@]*)?)
    (?:\?(?P<query>.*))?
    """,
    re.VERBOSE,
)

_CLIENTS = frozenset({"psycopg2", "psycopg2cffi", "psycopg", "psycopg_async", "asyncpg", "pg8000"})

# Known elsewhere and meaningless or without effect here; to ignore them could mean to connect
# with less than was asked for.
_FOREIGN = frozenset(
    {
        # SQLAlchemy and its dialects
        "async_creator_fn",
        "async_fallback",
        "client_encoding",
        "connect_args",
        "echo",
        "executemany_batch_page_size",
        "executemany_mode",
        "executemany_values_page_size",
        "isolation_level",
        "json_deserializer",
        "json_serializer",
        "max_overflow",
        "pool_pre_ping",
        "pool_recycle",
        "pool_size",
        "pool_timeout",
        "poolclass",
        "prepared_statement_cache_size",
        "prepared_statement_name_func",
        "ssl",
        "use_native_hstore",
        "use_native_unicode",
        "use_native_uuid",
        # libpq, and not supported by asyncpg
        "channel_binding",
        "gssencmode",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "load_balance_hosts",
        "require_auth",
        "sslcompression",
        "sslpassword_callback",
        "tcp_user_timeout",
    }
)
_INSTEAD = {
    "pool_size": "pass it to PostgresBroker or PostgresBackend, in place of a URL",
    "ssl": "write sslmode=require",
    "prepared_statement_cache_size": "write statement_cache_size=0 for none",
}
_SECRET = frozenset({"password", "sslpassword"})


class Target(msgspec.Struct, frozen=True):
    """A parsed URL.

    Attributes:
        url: For people: without the password.
        arguments: For `asyncpg.connect`.
        listen: Where to LISTEN, if that is another place.
    """

    url: str
    arguments: dict[str, Any]
    listen: Target | None = None

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler in transaction mode is to be expected: nothing is prepared then."""
        return self.arguments.get("statement_cache_size") == 0


def parse(url: str, *, listen_url: str | None = None) -> Target:
    """Read a URL.

    ``postgresql://`` and ``postgres://``, each with ``db+`` before and a client library's name
    after (``db+postgresql+psycopg2://``). Query parameters are libpq's, those that asyncpg does
    not act on go to the server as settings of the session; ``statement_cache_size=0`` is for
    PgBouncer, ``connect_timeout`` is in seconds. ``listen=host:port`` is the server itself, where
    the URL leads to PgBouncer in transaction mode: LISTEN needs a session.

    Args:
        url: The URL.
        listen_url: A whole URL, instead of `listen` in the other one.

    Raises:
        ConfigError: It is no such URL, or asks for what cannot be done here.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise ConfigError(
            "not a PostgreSQL URL: it should read postgresql://user:password@host:port/database"
        )
    client = found["client"]
    if client is not None and client not in _CLIENTS:
        raise ConfigError(f"unknown client library {client!r} in a PostgreSQL URL: leave it out")
    place = found["place"]
    try:
        query = parse_qsl(
            found["query"] or "", keep_blank_values=True, strict_parsing=bool(found["query"])
        )
    except ValueError:  # its text would show the query, and that may hold a password
        raise ConfigError(
            "the part after ? in the PostgreSQL URL should read name=value&name=value"
        ) from None
    _refuse_foreign(query)
    places = [value for name, value in query if name == "listen"]
    query = [(name, value) for name, value in query if name != "listen"]

    user, _, password = (found["login"] or "").partition(":")
    shown_login = ""
    if found["login"] is not None:
        shown_login = f"{user}:***@" if password else f"{user}@"
    shown_query = urlencode(
        [(name, "***" if name in _SECRET else value) for name, value in query], safe="*/,"
    )
    shown = f"postgresql://{shown_login}{place}" + (f"?{shown_query}" if shown_query else "")
    arguments = _arguments(place, query, unquote(user), unquote(password))
    listen = None
    if listen_url is not None:
        listen = parse(listen_url)
    elif places:
        listen = _elsewhere(places[-1], place, query, unquote(user), unquote(password))
    return Target(shown, arguments, listen)


def _elsewhere(
    host: str, place: str, query: list[tuple[str, str]], user: str, password: str
) -> Target:
    """Return the same database, user and password at another host and port."""
    if not re.fullmatch(r"[^/?@&]+", host):
        raise ConfigError(
            "listen in the PostgreSQL URL should be the host:port of the server itself;"
            " for more than that, pass listen_url to the driver"
        )
    database = place.partition("/")[2]
    return Target(host, _arguments(f"{host}/{database}", query, user, password))


def _refuse_foreign(query: list[tuple[str, str]]) -> None:
    foreign = sorted({name for name, _ in query} & _FOREIGN)
    if foreign:
        advice = [_INSTEAD[name] for name in foreign if name in _INSTEAD]
        raise ConfigError(
            f"asyncpg, which serves PostgreSQL here, does not know {', '.join(foreign)} in the URL:"
            f" {'; '.join([*advice, 'take it out'][:1])}"
        )


def _arguments(
    place: str, query: list[tuple[str, str]], user: str, password: str
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    passed = []
    for name, value in query:
        if name == "statement_cache_size":
            arguments[name] = int(_number(name, value))
        elif name == "connect_timeout":
            arguments["timeout"] = _number(name, value) or None
        else:
            passed.append((name, value))
    if not any(name == "application_name" for name, _ in passed):
        passed.append(("application_name", "aiotaskq"))
    arguments["dsn"] = f"postgresql://{place}?{urlencode(passed)}"
    # Apart from the URL, so that no message of the library about it can show the password.
    if user:
        arguments["user"] = user
    if password:
        arguments["password"] = password
    return arguments


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1_000_000:
        raise ConfigError(f"{name} in the PostgreSQL URL should be a number, not {value!r}")
    return number
