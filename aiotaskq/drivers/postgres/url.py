"""URLs of PostgreSQL servers, in the forms that Celery, SQLAlchemy and libpq accept.

The authority, with user, password and hosts, ends at the first ``/``, ``?`` or ``#``, as RFC 3986
says; within it the last ``@`` ends the password. So nothing behind the hosts can move the
connection, and the password with it, to another server. A password with one of these characters
that is not quoted leaves an ``@`` or a wrong port behind: such a URL is refused, and not shown.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode

import msgspec

from aiotaskq.drivers.common.certificates import CertificateFiles
from aiotaskq.drivers.common.url import (
    is_plain,
    is_secret,
    masked_account,
    masked_query,
    read_count,
    read_option,
    read_seconds_or_zero,
    unknown_option,
)
from aiotaskq.drivers.postgres.session_settings import SESSION_SETTINGS
from aiotaskq.errors import ConfigError

_URL = re.compile(
    r"""
    (?:db\+)?                                   # Celery's mark for a database
    (?:postgresql|postgres)
    (?:\+(?P<client>\w+))?                      # SQLAlchemy's client library
    ://
    (?:(?P<login>[^/?\#]*)@)?                   # greedy: a password may hold an unquoted @
    (?P<place>(?P<hosts>[^/?\#@]*)(?:/[^?\#@]*)?)
    (?:\?(?P<query>[^\#]*))?
    """,
    re.VERBOSE,
)
_QUOTED: Final = "in the user and the password write @ as %40, / as %2F, ? as %3F and # as %23"

_CLIENTS = frozenset({"psycopg2", "psycopg2cffi", "psycopg", "psycopg_async", "asyncpg", "pg8000"})

# Options of other tools that asyncpg does not support. They are refused: to ignore one could mean
# a connection that is less secure than the URL asks for.
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
        # libpq
        "channel_binding",
        "gssencmode",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "load_balance_hosts",
        "oauth_client_secret",
        "require_auth",
        "scram_client_key",
        "scram_server_key",
        "sslcompression",
        "sslpassword_callback",
        "tcp_user_timeout",
    }
)
# Advice for some of them.
_INSTEAD = {
    "pool_size": "pass it to PostgresBroker or PostgresBackend instead",
    "ssl": "write sslmode=require",
    "prepared_statement_cache_size": "write statement_cache_size=0 for none",
}


# The other options of asyncpg; all options that it does not know go to the server as settings.
_OWN = frozenset(
    {
        "connect_timeout",
        "database",
        "dbname",
        "gsslib",
        "host",
        "krbsrvname",
        "listen",
        "passfile",
        "password",
        "port",
        "service",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
        "sslcert",
        "sslcrl",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslpassword",
        "sslrootcert",
        "statement_cache_size",
        "target_session_attrs",
        "user",
    }
)


class PostgresUrl(msgspec.Struct, frozen=True):
    """A parsed URL.

    Attributes:
        shown: The URL without passwords, for people.
        arguments: The keyword arguments for `asyncpg.connect`.
        listen: The server to LISTEN on, if it is another one.
        files: The files with certificates that it names.
    """

    shown: str
    arguments: dict[str, Any]
    listen: PostgresUrl | None = None
    files: CertificateFiles = CertificateFiles()

    def __repr__(self) -> str:
        return f"<PostgresUrl {self.shown}>"  # not the arguments: one of them is the password

    @property
    def is_pooled(self) -> bool:
        """Return whether the URL leads to a pooler by transaction: nothing is prepared then."""
        return self.arguments.get("statement_cache_size") == 0


def parse_url(url: str, *, listen_url: str | None = None) -> PostgresUrl:
    """Parse a URL.

    The scheme is ``postgresql://`` or ``postgres://``, with an optional ``db+`` before it and an
    optional name of a client library after it (``db+postgresql+psycopg2://``). The options are
    those of libpq; asyncpg sends the options that it does not know to the server, as settings of
    the session. Three more are read here: ``statement_cache_size=0`` for PgBouncer,
    ``connect_timeout`` in seconds, and ``listen=host:port``, the address of the server itself where
    the URL leads to PgBouncer in transaction mode, because LISTEN needs a session.

    Args:
        url: The URL.
        listen_url: A complete URL in place of the option `listen`.

    Raises:
        ConfigError: The URL is malformed, or has an option that is not supported.
    """
    found = _URL.fullmatch(url) if is_plain(url) else None
    if found is None:
        hint = f"; {_QUOTED}" if "@" in url else ""
        raise ConfigError(
            "not a PostgreSQL URL: it should read"
            f" postgresql://user:password@host:port/database{hint}"
        )
    client = found["client"]
    if client is not None and client not in _CLIENTS:
        raise ConfigError(f"unknown client library {client!r} in a PostgreSQL URL: leave it out")
    login, place = found["login"], found["place"]
    _refuse_misplaced_secret(login, found["hosts"], found["query"] or "")
    try:
        query = parse_qsl(
            found["query"] or "", keep_blank_values=True, strict_parsing=bool(found["query"])
        )
    except ValueError:  # its text would show the query, which may contain a password
        raise ConfigError(
            "the part after ? in the PostgreSQL URL should read name=value&name=value"
        ) from None
    _refuse_unknown(query)
    addresses = [value for name, value in query if name == "listen"]
    query = [(name, value) for name, value in query if name != "listen"]

    user, _, password = (login or "").partition(":")
    account = (unquote(user), unquote(password))
    listen = None
    if listen_url is not None:
        listen = parse_url(listen_url)
    elif addresses:
        listen = _same_database_at(addresses[-1], place, query, account)
    shown = _shown(login, place, query)
    return PostgresUrl(
        shown, _connect_arguments(place, query, account), listen, _certificate_files(dict(query))
    )


def _shown(login: str | None, place: str, query: list[tuple[str, str]]) -> str:
    """Return the URL for people."""
    account = "" if login is None else f"{masked_account(login)}@"
    # `options` carries settings of the session, as in "-c app.secret=...".
    shown = masked_query(
        (name, "***" if name == "options" and is_secret(value) else value) for name, value in query
    )
    return f"postgresql://{account}{place}{'?' if shown else ''}{shown}"


def _refuse_misplaced_secret(login: str | None, hosts: str, query: str) -> None:
    """Refuse a URL in which a part of a password may stand where it would be shown, or sent."""
    # Without an @ before the hosts, the options could be the rest of a password with a ?.
    if login is None and "@" in query:
        raise ConfigError(
            "it is not clear where the password in the PostgreSQL URL ends:"
            f" {_QUOTED}, and in options @ as %40"
        )
    # Without an @ the user and the password look like a host and its port.
    for host in re.sub(r"\[[^]]*\]", "", hosts).split(","):
        port = host.partition(":")[2]
        if port and not (port.isascii() and port.isdigit()):
            raise ConfigError(
                "the port in the PostgreSQL URL should be a number;"
                f" a user and a password end with an @, and {_QUOTED}"
            )


def _same_database_at(
    address: str, place: str, query: list[tuple[str, str]], account: tuple[str, str]
) -> PostgresUrl:
    """Return the URL of the same database at another host and port, with the same account."""
    if not re.fullmatch(r"[^/?@&]+", address):
        raise ConfigError(
            "listen in the PostgreSQL URL should be the host:port of the server itself;"
            " for more than that, pass listen_url to the driver"
        )
    database = place.partition("/")[2]
    return PostgresUrl(address, _connect_arguments(f"{address}/{database}", query, account))


def _refuse_unknown(query: list[tuple[str, str]]) -> None:
    """Refuse options that neither asyncpg nor the server knows."""
    foreign = sorted({name for name, _ in query} & _FOREIGN)
    if foreign:
        advice = next((_INSTEAD[name] for name in foreign if name in _INSTEAD), "remove it")
        raise ConfigError(
            f"asyncpg, the client library for PostgreSQL, does not support {', '.join(foreign)}"
            f" in the URL: {advice}"
        )
    for name, text in query:
        # A dot: a setting of an extension or of the application.
        if name not in _OWN and name.lower() not in SESSION_SETTINGS and "." not in name:
            raise unknown_option(
                "a PostgreSQL URL",
                name,
                text,
                _OWN | SESSION_SETTINGS,
                more="; another setting of the server can be given as options=-c%20name%3Dvalue",
            )


def _certificate_files(options: dict[str, str]) -> CertificateFiles:
    """Return the files that asyncpg will read, and reads anew for each connection."""
    return CertificateFiles(
        authorities=tuple(
            (name, options[name]) for name in ("sslrootcert", "sslcrl") if options.get(name)
        ),
        chain=("sslcert", options["sslcert"]) if options.get("sslcert") else None,
        key=("sslkey", options["sslkey"]) if options.get("sslkey") else None,
        password=options.get("sslpassword", ""),
    )


def _connect_arguments(
    place: str, query: list[tuple[str, str]], account: tuple[str, str]
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    passed = []
    for name, value in query:
        if name == "statement_cache_size":
            arguments[name] = read_option(name, value, read_count)
        elif name == "connect_timeout":
            arguments["timeout"] = read_option(name, value, read_seconds_or_zero) or None
        else:
            passed.append((name, value))
    if not any(name == "application_name" for name, _ in passed):
        passed.append(("application_name", "aiotaskq"))
    arguments["dsn"] = f"postgresql://{place}?{urlencode(passed)}"
    # Not in the URL, so that no error of the library about the URL can show the password.
    user, password = account
    if user:
        arguments["user"] = user
    if password:
        arguments["password"] = password
    return arguments
