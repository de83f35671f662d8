"""What tables, indexes and channels are called under a prefix."""

from __future__ import annotations

from aiotaskq.errors import ConfigError

_LONGEST_PREFIX = 40  # bytes; PostgreSQL cuts names at 63, and an index has the longest ending


class Names:
    """The names under one prefix.

    Attributes:
        prefix: As it was given.

    Raises:
        ConfigError: PostgreSQL has no such names.
    """

    def __init__(self, prefix: str) -> None:
        if not prefix or len(prefix.encode()) > _LONGEST_PREFIX or "\0" in prefix:
            raise ConfigError(
                f"the prefix {prefix!r} cannot name a PostgreSQL table:"
                f" it should have 1 to {_LONGEST_PREFIX} bytes"
            )
        self.prefix = prefix
        self._quoted = prefix.replace('"', '""')
        self._rendered: dict[str, str] = {}

    def render(self, template: str) -> str:
        """Return a statement with the prefix in the place of ``{prefix}``, inside of quotes."""
        text = self._rendered.get(template)
        if text is None:
            text = self._rendered[template] = template.replace("{prefix}", self._quoted)
        return text

    def table(self, name: str) -> str:
        """Return a table's name, quoted."""
        return f'"{self._quoted}_{name}"'

    def channel(self, name: str | int) -> str:
        """Return the name of a channel for LISTEN and NOTIFY, unquoted."""
        return f"{self.prefix}_{name}"
