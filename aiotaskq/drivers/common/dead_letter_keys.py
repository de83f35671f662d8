"""Keys of dead letters: the number that a key is, and the error for a text that is no key."""

from __future__ import annotations

from aiotaskq.errors import ConfigError

LAST_NUMBER = 2**63 - 1
"""The largest key where dead letters are numbered: stores have 64 bits for it."""


def number_of_key(key: str) -> int | None:
    """Return the number that a key is, or None for a text that no letter has as its key."""
    if not (key.isascii() and key.isdigit()) or len(key) > len(str(LAST_NUMBER)):
        return None
    if key[0] == "0" and key != "0":  # brokers write no leading zeros
        return None
    return min(int(key), LAST_NUMBER)


def number_before(before: str | None) -> int:
    """Return the number below which `Broker.dead` reads, given its argument `before`.

    Raises:
        ConfigError: It is no key.
    """
    number = LAST_NUMBER if before is None else number_of_key(before)
    if number is None:
        raise not_a_key(before)
    return number


def not_a_key(before: str | None) -> ConfigError:
    """Return the error for a `before` that this broker has never given as a key."""
    return ConfigError(
        f"{before!r} is not the key of a dead letter: give one that was listed before"
    )
