"""URLs of SQLite files."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from aiotaskq.drivers.common.url import Reader, one_of, read_options, read_seconds_or_zero
from aiotaskq.errors import ConfigError

_OPTIONS: dict[str, Reader] = {
    "busy_timeout": read_seconds_or_zero,
    "synchronous": one_of("full", "normal"),
}


class SQLiteUrl(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a URL of this driver.

    Attributes:
        text: The URL for people.
        path: The file; may be relative until the file is opened.
        synchronous: "full": what was accepted survives a power cut. "normal": it survives the
            crash of any process, but a power cut may take the last moments.
        busy_timeout: Seconds to wait while another process writes.
    """

    text: str
    path: Path
    synchronous: str = "full"
    busy_timeout: float = 10.0

    @classmethod
    def parse(cls, url: str) -> SQLiteUrl:
        """Read a URL.

        Raises:
            ConfigError: The URL names no file, has an unknown option, or one with a wrong value.
        """
        try:
            parts = urlsplit(url)
        except ValueError:  # its text may show all of the URL
            raise _not_a_file() from None
        path = unquote(parts.path)[1:]
        if parts.scheme != "sqlite" or parts.netloc or not path or path == ":memory:":
            raise _not_a_file()
        shown = re.sub(r":[^:@]*@", ":***@", url)  # the URL of a server, pasted behind sqlite:///
        return cls(text=shown, path=Path(path), **read_options(parts, _OPTIONS))


def _not_a_file() -> ConfigError:
    # Without the URL: with another scheme, there may be a password in it.
    return ConfigError(
        "this URL names no SQLite file: write sqlite:///name.db for a file in the working folder,"
        " or sqlite:////folder/name.db; for tasks that may be lost with the process, use memory://"
    )
