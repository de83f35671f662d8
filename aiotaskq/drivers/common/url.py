"""URLs of servers: splitting them, reading their options, and masking their secrets.

No error here quotes a part of a URL that may belong to a password. One that is not quoted as RFC
3986 (https://www.rfc-editor.org/rfc/rfc3986) asks for ends the host too early, so that its rest
looks like a path, an option or a fragment: such a URL is refused as a whole.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from aiotaskq.errors import ConfigError

Reader: TypeAlias = Callable[[str], Any]
"""Returns the value of an option, or raises a `ValueError`."""


_OPTION_NAME = re.compile(r"[a-z]+(_[a-z]+)*", re.IGNORECASE)
_SCHEME = re.compile(
    r"(?:db\+)?(?:rediss?(?:\+\w+)?|unix|postgres(?:ql)?(?:\+\w+)?|(?:py)?amqps?|rpc|sqlite|memory"
    r"|disabled)\b[:/]*"
)
# A host is a name, an address or an IPv6 address in brackets; a port is a number. A password in
# which a character is not quoted does not look like that.
_PLACE = r"(?:[\w.%-]*|\[[\w.:%]+\])(?::[0-9]*)?"
_PLACES = rf"{_PLACE}(?:,{_PLACE})*"
_USUAL = re.compile(
    rf"""
    (?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://
    (?:(?P<account>[^/?\#]*)@)?
    (?P<place>{_PLACES})
    (?P<path>(?:/[^?\#@:]*)?)
    (?:\?(?P<query>[\w.]+=[^\#@&]*(?:&[\w.]+=[^\#@&]*)*))?
    """,
    re.VERBOSE,
)
# As in appendix B of RFC 3986. `urlsplit` is for one host: of several, newer Pythons refuse one in
# brackets behind another one.
_PARTS = re.compile(
    r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?\#]*))?([^?\#]*)(?:\?([^\#]*))?(?:\#(.*))?"
)


def split_url(url: str, *, system: str, schemes: Collection[str]) -> SplitResult:
    """Split a URL into its parts.

    Args:
        url: The URL; the user, the password and each option are quoted.
        system: The name of the system, for errors.
        schemes: Those that are served.

    Raises:
        ConfigError: It has another scheme, or something in it is not quoted.
    """
    found = _PARTS.fullmatch(url) if is_plain(url) else None
    if found is None or not _is_usual(found[2] or ""):
        raise ConfigError(f"not a {system} URL: it has odd characters, or brackets, in it")
    scheme, netloc, path, query, fragment = (part or "" for part in found.groups())
    parts = SplitResult(scheme.lower(), netloc, path, query, fragment)
    if parts.scheme not in schemes:
        *others, last = (f"{scheme}://" for scheme in schemes)
        raise ConfigError(
            f"not a {system} URL: it begins with {parts.scheme or 'nothing'}://, and may begin with"
            f" {' or '.join((', '.join(others), last)) if others else last}"
        )
    path = parts.path if parts.netloc or parts.scheme != "unix" else ""
    if any("@" in one for one in (path, parts.query, parts.fragment)):
        raise ConfigError(
            f"not a {system} URL: the user and the password, before the @, are quoted: / is %2F,"
            " ? is %3F and # is %23 there; and behind the host an @ is %40"
        )
    return parts


def _is_usual(netloc: str) -> bool:
    """Return whether brackets are where they are expected: around the addresses of hosts.

    Characters that stand for a slash or an @ in other forms of Unicode are not expected at all.
    """
    strange = [unicodedata.normalize("NFKC", one) for one in netloc if not one.isascii()]
    if any(mark in form for form in strange for mark in "/?#@:[]"):
        return False
    account, _, places = netloc.rpartition("@")
    odd = "[" in places or "]" in places
    return account.count("[") == account.count("]") and (
        not odd or bool(re.fullmatch(_PLACES, places))
    )


def host_and_port(text: str, default_port: int, *, system: str) -> tuple[str, int]:
    """Return the host and the port that a part of a URL names.

    Args:
        text: ``host``, ``host:port`` or ``[IPv6]:port``; ``user:password@`` before it is ignored.
            An empty host is this machine.
        default_port: The port where there is none in the text.
        system: The name of the system, for errors.

    Raises:
        ConfigError: The port is no number, or the brackets do not enclose an IPv6 address.
    """
    try:
        place = urlsplit(f"//{text}")
        return unquote(place.hostname or "localhost"), place.port or default_port
    except ValueError:  # which quotes the text, and that may be a part of a password
        raise ConfigError(
            f"not a {system} URL: it names hosts as host:port, with a port from 1 to 65535"
        ) from None


def read_options(parts: SplitResult, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Return the options of a URL, those behind the ``?``.

    Args:
        parts: The URL.
        readers: The known options, each with a function that reads its value.

    Raises:
        ConfigError: It has an option that there is not, or one with a wrong value.
    """
    options: dict[str, Any] = {}
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name not in readers:
            raise unknown_option(f"a {parts.scheme}:// URL", name, text, readers)
        options[name] = read_option(name, text, readers[name])
    return options


def unknown_option(
    what: str, name: str, text: str, known: Collection[str], *, more: str = ""
) -> ConfigError:
    """Return the error for an option that there is not, with the one that was probably meant.

    Args:
        what: The kind of URL.
        name: As the user wrote it. It is quoted only if it looks like an option with a value, as it
            may be the rest of a password with a ``?`` in it.
        text: Its value.
        known: The options that there are.
        more: Advice in place of the list of them, where it is long.
    """
    from difflib import get_close_matches  # slow to import, and needed only for errors

    close = get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    is_name = bool(close or (text and _OPTION_NAME.fullmatch(name)))
    shown = f" {name!r}" if is_name else " of that name"
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(sorted(known))
    return ConfigError(f"{what} has no option{shown}{hint}{more or f'; it may have {listed}'}")


def read_option(name: str, text: str, reader: Reader) -> Any:
    """Return the value of one option.

    Raises:
        ConfigError: The value is wrong.
    """
    try:
        return reader(text)
    except ValueError as error:
        shown = "***" if is_secret(name) else repr(text)
        wanted = str(error)
        raise ConfigError(
            f"{shown} is not a value of the option {name!r}"
            + (f"; it must be {wanted}" if wanted else "")
        ) from None


def masked_url(parts: SplitResult) -> str:
    """Return a URL for people: without the password, and without options that are secret."""
    account, at, place = parts.netloc.rpartition("@")
    query = masked_query(parse_qsl(parts.query, keep_blank_values=True))
    netloc = f"{masked_account(account)}{at}{place}"
    path = re.sub(r":[^:@]*@", ":***@", parts.path)  # of a socket: behind a slash too many
    return f"{parts.scheme}://{netloc}{path}{'?' if query else ''}{query}"


def masked_account(account: str) -> str:
    """Return the user and the password of a URL, without the password."""
    user, colon, _ = account.partition(":")
    if "%3A" in user.upper():  # a colon that was quoted as well: the password stands behind it
        user = "***"
    return f"{user}{':***' if colon else ''}"


def shown_url(text: str) -> str:
    """Return a text that should be a URL for people, before any driver has read it.

    A URL in its usual form is shown without what is secret. Of any other text nothing is shown but
    its scheme, if it begins with a known one: all the rest may belong to a password.
    """
    found = _USUAL.fullmatch(text) if is_plain(text) else None
    if found is not None:
        account = "" if found["account"] is None else f"{masked_account(found['account'])}@"
        query = masked_query(parse_qsl(found["query"] or "", keep_blank_values=True))
        mark = "?" if query else ""
        return f"{found['scheme']}://{account}{found['place']}{found['path']}{mark}{query}"
    scheme = _SCHEME.match(text)
    return f"{scheme[0]}***" if scheme is not None else "***"


def is_plain(text: str) -> bool:
    """Return whether a text has no spaces and no characters that cannot be seen."""
    return text.isprintable() and " " not in text


def masked_query(options: Iterable[tuple[str, str]]) -> str:
    """Return options as they stand behind the ``?``, with ``***`` for those that are secret."""
    return "&".join(
        f"{quote(name)}={'***' if is_secret(name) else quote(text, safe='*/,:')}"
        for name, text in options
    )


def is_secret(option: str) -> bool:
    """Return whether the value of an option is secret, also where its name is misspelt."""
    words = ("pass", "pasw", "pswd", "pwd", "secret", "token", "credential")
    return any(word in option.lower() for word in words)


# --- readers ------------------------------------------------------------------------------------


def read_flag(text: str) -> bool:
    """Read ``true`` or ``false``, also written as yes or no, 1 or 0."""
    if text.lower() not in {"true", "false", "1", "0", "yes", "no"}:
        raise ValueError("true or false")
    return text.lower() in {"true", "1", "yes"}


def read_seconds(text: str) -> float:
    """Read a time in seconds, more than 0."""
    seconds = _read_number(text)
    if not 0.0 < seconds < 1e6:
        raise ValueError("seconds, more than 0")
    return seconds


def read_seconds_or_zero(text: str) -> float:
    """Read a time in seconds, 0 or more."""
    seconds = _read_number(text)
    if not 0.0 <= seconds < math.inf:
        raise ValueError("seconds, 0 or more")
    return seconds


def read_count(text: str) -> int:
    """Read a whole number, 0 or more."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("a whole number, 0 or more")
    return int(text)


def one_of(*names: str) -> Reader:
    """Return a reader of one of these names, in upper or lower case."""

    def read(text: str) -> str:
        if text.lower() not in names:
            raise ValueError(" or ".join(names))
        return text.lower()

    return read


def _read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
