"""Which names stand for which setting, and what to say about those that stand for none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aiotaskq.config.celery import FOREIGN, OLD_STARTS, old_names
from aiotaskq.config.settings import SETTINGS
from aiotaskq.errors import ConfigError

LOWER_NAMES = (*SETTINGS, *FOREIGN)

NAMES: Mapping[str, str] = {
    **{name: name for name in LOWER_NAMES},
    **old_names(name for name, setting in SETTINGS.items() if not setting.ours),
}
"""Every spelling that is understood, and the lower-case name that it stands for."""


class UnknownSetting(ConfigError, AttributeError, KeyError):
    """No setting has that name. What Python expects of a missing attribute or key, too."""

    def __str__(self) -> str:
        # KeyError would show the sentence in quotes.
        return str(self.args[0])


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the one of `known` that is most like `name`, if any is like it."""
    from difflib import get_close_matches  # only who misspells pays for it

    matches = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def unknown(what: str, name: str, suggestion: str | None) -> UnknownSetting:
    """Return the error for a name, with the name that may have been meant."""
    hint = f"; did you mean {suggestion!r}?" if suggestion else ""
    return UnknownSetting(f"unknown {what} {name!r}{hint}")


def resolve(name: object) -> str:
    """Return the lower-case name that `name` stands for.

    Raises:
        UnknownSetting: It stands for none.
    """
    if not isinstance(name, str):
        raise UnknownSetting(f"the name of a setting is text, not {name!r}")
    if name in NAMES:
        return NAMES[name]
    start, _, rest = name.partition("_")
    if rest.isupper() and rest.lower() in SETTINGS and f"{start}_" not in OLD_STARTS[1:]:
        raise UnknownSetting(
            f"unknown setting {name!r}; did you mean {rest.lower()!r}, or to load it with "
            f"namespace={start!r}?"
        )
    raise unknown("setting", name, nearest(name, NAMES))
