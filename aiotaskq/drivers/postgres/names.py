"""Names of tables, indexes and channels under a prefix."""

from __future__ import annotations

from aiotaskq.errors import ConfigError

# Bytes. PostgreSQL cuts names at 63, and the longest name of an index adds 23 to the prefix.
_LONGEST_PREFIX = 40


class PostgresNames:
    """Names of tables, indexes and channels under one prefix.

    Attributes:
        prefix: The prefix, unquoted.

    Raises:
        ConfigError: The prefix cannot begin the name of a table.
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
        """Return a statement with the prefix in place of ``{prefix}``, which is inside quotes."""
        text = self._rendered.get(template)
        if text is None:
            text = self._rendered[template] = template.replace("{prefix}", self._quoted)
        return text

    def table(self, name: str) -> str:
        """Return the quoted name of a table."""
        return f'"{self._quoted}_{name}"'

    def channel(self, name: str | int) -> str:
        """Return the unquoted name of a channel for LISTEN and NOTIFY."""
        return f"{self.prefix}_{name}"
