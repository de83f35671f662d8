"""Lookup of settings by name, in every spelling, and suggestions for unknown names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aiotaskq.config.celery import CELERY_ONLY, OLD_STARTS, old_names
from aiotaskq.config.settings import SETTINGS
from aiotaskq.errors import ConfigError

LOWER_NAMES = (*SETTINGS, *CELERY_ONLY)

NAMES: Mapping[str, str] = {
    **{name: name for name in LOWER_NAMES},
    **old_names(name for name, setting in SETTINGS.items() if not setting.ours),
}
"""Every accepted spelling, with the lower-case name of its setting."""


class UnknownSetting(ConfigError, AttributeError, KeyError):
    """No setting has that name. Also an `AttributeError` and a `KeyError`, as Python expects."""

    def __str__(self) -> str:
        # KeyError would print the message in quotes.
        return str(self.args[0])


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar of the known names; None if none is similar."""
    from difflib import get_close_matches  # slow to import, and needed only for errors

    matches = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def unknown(what: str, name: str, suggestion: str | None) -> UnknownSetting:
    """Return the error for an unknown name, with the name that was probably meant."""
    hint = f"; did you mean {suggestion!r}?" if suggestion else ""
    return UnknownSetting(f"unknown {what} {name!r}{hint}")


def resolve(name: object) -> str:
    """Return the lower-case name of the setting that `name` is a spelling of.

    Raises:
        UnknownSetting: It is no spelling of a setting.
    """
    if not isinstance(name, str):
        raise UnknownSetting(f"the name of a setting is text, not {name!r}")
    if name in NAMES:
        return NAMES[name]
    start, _, rest = name.partition("_")
    if rest.isupper() and rest.lower() in SETTINGS and f"{start}_" not in OLD_STARTS[1:]:
        raise UnknownSetting(
            f"unknown setting {name!r}; did you mean {rest.lower()!r}, or did you want to load it "
            f"with namespace={start!r}?"
        )
    raise unknown("setting", name, nearest(name, NAMES))
