"""`Config`, the object behind ``app.conf``: what is set where, and what holds.

What is set in code, or loaded from an object, goes before the environment, and that before the
defaults. Every value is checked where it is set, so that a mistake is found at start, with the
name of the setting, and not in the middle of a night.

- `settings`: what settings there are.
- `kinds`: what their values may be.
- `celery`: Celery's other names, and those of its settings that do not exist here.
- `names`, `sources`: which names there are, and where settings are read from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from aiotaskq.config.celery import FOREIGN
from aiotaskq.config.kinds import NOTHING, Serializer
from aiotaskq.config.names import NAMES, UnknownSetting, resolve
from aiotaskq.config.settings import SETTINGS, Setting, Settings
from aiotaskq.config.sources import Found, read_environment, read_items, read_source
from aiotaskq.errors import ConfigError

__all__ = ["Config", "Serializer", "Setting", "UnknownSetting"]

# Greedy, up to the last "@": a password may hold one, and hiding too much does no harm.
_USER_INFO = re.compile(r"(://[^:/@]*):.*@", re.DOTALL)
_SECRET_QUERY = re.compile(r"([?&;][^=&]*(?:pass|pwd|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)


class Config(Settings):
    """The settings of one application.

    Each is an attribute that can be read and assigned. Celery's old upper-case names stand for the
    same settings. Threads may read while another one sets: they see all of an `update`, or nothing.

    Args:
        environ: The variables to read, once: ``AIOTASKQ_`` and the upper-case name of a setting.
            An empty one counts as not set. Those that begin with ``AIOTASKQ_TESTS_`` are left
            alone.

    Raises:
        ConfigError: A variable of that kind has a wrong value, or names no setting.
    """

    __slots__ = ()

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._values = _consistent(read_environment(environ))

    # --- setting ---

    def update(self, settings: Mapping[str, object] = NOTHING, /, **more: object) -> None:
        """Set several settings: all of them, or on an error none.

        Args:
            settings: Values by name.
            more: The same, as keywords.

        Raises:
            ConfigError: A name is unknown, a value is not what the setting takes, two names
                of one setting disagree, or the values do not fit each other.
        """
        self._apply(read_items([*settings.items(), *more.items()]))

    def load(self, source: object, *, namespace: str | None = None) -> None:
        """Set what `source` holds: all of it, or on an error nothing.

        Every item of a mapping has to be a setting. Of a module, a class or an instance the
        attributes are taken that are settings; imports, functions, classes and names that begin
        with an underscore are left alone, and so are other constants, unless they look like the
        misspelling of a setting.

        Args:
            source: A mapping, a module, a class or an instance; or the dotted name of a module
                or of something in one (``"package.module"``, ``"package.module:name"``).
            namespace: Take the names that begin with it and an underscore, and no others:
                with ``"CELERY"`` the name ``CELERY_BROKER_URL`` sets `broker_url`.

        Raises:
            ConfigError: There is no such source, or as with `update`.
        """
        self._apply(read_source(source, namespace))

    def _assign(self, settings: Mapping[str, object]) -> None:
        self._apply(read_items(settings.items()))

    def _apply(self, found: Iterable[Found]) -> None:
        checked: dict[str, Any] = {}
        spellings: dict[str, str] = {}
        for spelled, name, value in found:
            wanted = _check(spelled, name, value)
            if name in checked and checked[name] != wanted:
                raise ConfigError(
                    f"{spellings[name]} and {spelled} set the same, {name}, to different values; "
                    "keep one of them"
                )
            checked[name] = wanted
            spellings[name] = spelled
        own = {name: value for name, value in checked.items() if name in SETTINGS}
        # One assignment of a whole new mapping: no thread sees half of it.
        self._values = _consistent({**self._values, **own})

    # --- reading ---

    @property
    def revision(self) -> object:
        """An object that is replaced by each change, for caches of what follows from settings."""
        return self._values

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a setting, or `default` if there is no setting of that name."""
        known = name in self
        return self[name] if known else default

    def keys(self) -> Iterator[str]:
        """Return the names of all settings."""
        return iter(SETTINGS)

    def as_dict(self) -> dict[str, Any]:
        """Return the value of every setting by its name, passwords included.

        Its values can be pickled, and given to `update` elsewhere; a `Retry` whose backoff is a
        function, only if that function can be.
        """
        return _plain({name: getattr(self, name) for name in SETTINGS})

    def route(self, task_name: str) -> str | None:
        """Return the queue that `task_routes` has for a task, or None.

        A full name goes before a glob, and of the globs the first that matches.
        """
        routes = self.task_routes
        if not routes:
            return None
        exact = routes.get(task_name)
        if exact is not None:
            return exact
        return next((routes[glob] for glob in routes if fnmatchcase(task_name, glob)), None)

    @staticmethod
    def settings() -> Mapping[str, Setting[Any, Any]]:
        """Return what there is to set, by name: defaults, meanings, what values are wanted."""
        return SETTINGS

    def __getitem__(self, name: str) -> Any:
        known = resolve(name)
        if known in SETTINGS:
            return getattr(self, known)
        foreign = FOREIGN[known]
        if not foreign.fine:
            raise UnknownSetting(f"{name} does not exist here: {foreign.reason}")
        return foreign.fine[0]

    def __setitem__(self, name: str, value: object) -> None:
        self._assign({name: value})

    def __contains__(self, name: object) -> bool:
        known = NAMES.get(name, "") if isinstance(name, str) else ""
        return known in SETTINGS or (known in FOREIGN and bool(FOREIGN[known].fine))

    def __iter__(self) -> Iterator[str]:
        return iter(SETTINGS)

    def __len__(self) -> int:
        return len(SETTINGS)

    def __repr__(self) -> str:
        items = (f"{name}={_masked(value)!r}" for name, value in self._values.items())
        return f"Config({', '.join(items)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (_plain(self._values),)

    # Hidden from type checkers, which would take any misspelt name otherwise.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Python itself asks for such names, to copy or to show an object.
            if name.startswith("_"):
                raise AttributeError(f"Config has no attribute {name!r}")
            return self[name]

        def __setattr__(self, name: str, value: object) -> None:
            if name == "_values":
                object.__setattr__(self, name, value)
            else:
                self._assign({name: value})


def _check(spelled: str, name: str, value: object) -> object:
    """Return the value of a known setting in the form in which it is read."""
    label = spelled if spelled == name else f"{spelled} ({name})"
    setting = SETTINGS.get(name)
    if setting is None:
        return FOREIGN[name].check(label, value)
    return setting.check(value, spelled=label)


def _consistent(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `values` if they fit each other."""
    lease = values.get("worker_lease", Settings.worker_lease.default)
    heartbeat = values.get("worker_heartbeat", Settings.worker_heartbeat.default)
    # Two signs of life have to fit into a lease, or one late one would cost it.
    if heartbeat * 2 >= lease:
        raise ConfigError(
            f"worker_heartbeat ({heartbeat:g} s) has to be less than half of worker_lease "
            f"({lease:g} s); conf.update(worker_lease=..., worker_heartbeat=...) sets both at once"
        )
    soft, hard = values.get("task_soft_time_limit"), values.get("task_time_limit")
    if soft is not None and hard is not None and soft >= hard:
        raise ConfigError(
            f"task_soft_time_limit ({soft:g} s) has to be less than task_time_limit ({hard:g} s); "
            "conf.update(task_soft_time_limit=..., task_time_limit=...) sets both at once"
        )
    return values


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()
    }


def _restored(values: Mapping[str, object]) -> Config:
    config = Config({})
    config.update(values)
    return config


def _masked(value: object) -> object:
    if isinstance(value, str):
        return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub(r"\1:***@", value))
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    return value
