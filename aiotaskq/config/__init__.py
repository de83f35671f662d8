"""Settings of an application: `Config`, the object behind ``app.conf``.

A value set in code, or loaded from an object, overrides the environment. The environment overrides
the default. Every value is checked where it is set, so a mistake is found when the program starts,
and the error names the setting.

- `settings`: the table of all settings.
- `value_types`: the types of their values, with their checks.
- `celery`: Celery's old names, and Celery's settings that do not exist here.
- `names`: the lookup of a name, and the suggestion for an unknown one.
- `sources`: reading settings from modules, classes, mappings and the environment.
- `service_links`: variables of Kubernetes and Docker that are no settings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from aiotaskq.config.celery import CELERY_ONLY
from aiotaskq.config.names import NAMES, UnknownSetting, resolve
from aiotaskq.config.settings import SETTINGS, Setting, SettingsTable
from aiotaskq.config.sources import FoundSetting, read_environment, read_items, read_source
from aiotaskq.config.value_types import EMPTY, Serializer
from aiotaskq.drivers.common.url import shown_url
from aiotaskq.errors import ConfigError

__all__ = ["Config", "Serializer", "Setting", "UnknownSetting"]

_ACCOUNT = re.compile(r"://|:.*@", re.DOTALL)  # a text like this may hold a password


class Config(SettingsTable):
    """The settings of one application.

    Each setting is an attribute that can be read and assigned. Celery's old upper-case names work
    as well. Threads may read while another thread sets: they see all of an `update`, or nothing.

    Args:
        environ: The environment variables; they are read once. The variable of a setting is
            ``AIOTASKQ_`` and the upper-case name of the setting. An empty variable counts as not
            set. Ignored are variables that begin with ``AIOTASKQ_TESTS_``, and those that
            Kubernetes and Docker set for services, such as ``AIOTASKQ_PORT=tcp://10.0.0.1:6379``.

    Raises:
        ConfigError: A variable that begins with ``AIOTASKQ_`` has a wrong value, or there is no
            such setting.
    """

    __slots__ = ()

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._values = _consistent(read_environment(environ))

    # --- setting ---

    def update(self, settings: Mapping[str, object] = EMPTY, /, **more: object) -> None:
        """Set several settings: all of them, or none if there is an error.

        Args:
            settings: Values by name.
            more: More values, as keywords.

        Raises:
            ConfigError: A name is unknown, a value is wrong, two names of one setting have
                different values, or the values of two settings contradict each other.
        """
        self._apply(read_items([*settings.items(), *more.items()]))

    def load(self, source: object, *, namespace: str | None = None) -> None:
        """Set the settings in `source`: all of them, or none if there is an error.

        Every item of a mapping has to be a setting. In a module, a class or an instance, only the
        attributes that are settings are read. Imports, functions, classes and names that begin
        with an underscore are ignored. Other constants are ignored too, unless one looks like a
        misspelled setting: that is an error.

        Args:
            source: A mapping, a module, a class or an instance; or the dotted name of a module
                or of an object in a module (``"package.module"``, ``"package.module:name"``).
            namespace: Read only the names that begin with it and an underscore: with ``"CELERY"``
                the name ``CELERY_BROKER_URL`` sets `broker_url`.

        Raises:
            ConfigError: There is no such source, or as for `update`.
        """
        self._apply(read_source(source, namespace))

    def _assign(self, settings: Mapping[str, object]) -> None:
        self._apply(read_items(settings.items()))

    def _apply(self, found: Iterable[FoundSetting]) -> None:
        checked: dict[str, Any] = {}
        spellings: dict[str, str] = {}
        for spelled, name, value in found:
            wanted = _check(spelled, name, value)
            if name in checked and checked[name] != wanted:
                raise ConfigError(
                    f"{spellings[name]} and {spelled} set {name} to different values; "
                    "keep one of them"
                )
            checked[name] = wanted
            spellings[name] = spelled
        own = {name: value for name, value in checked.items() if name in SETTINGS}
        # One assignment of a whole new mapping: no thread sees half of an update.
        self._values = _consistent({**self._values, **own})

    # --- reading ---

    @property
    def revision(self) -> object:
        """An object that each change replaces, for caches of values that depend on settings."""
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

        The values can be pickled, and given to `update` in another process. A `Retry` whose backoff
        is a function can be pickled only if the function can.
        """
        return _plain({name: getattr(self, name) for name in SETTINGS})

    def route(self, task_name: str) -> str | None:
        """Return the queue that `task_routes` gives to a task, or None.

        A full name takes precedence over a pattern. Of several patterns the first match counts.
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
        """Return all settings by name, each with its default, its meaning and its values."""
        return SETTINGS

    def __getitem__(self, name: str) -> Any:
        known = resolve(name)
        if known in SETTINGS:
            return getattr(self, known)
        celery_only = CELERY_ONLY[known]
        if not celery_only.accepted:
            raise UnknownSetting(f"{name} does not exist in aiotaskq: {celery_only.reason}")
        return celery_only.accepted[0]

    def __setitem__(self, name: str, value: object) -> None:
        self._assign({name: value})

    def __contains__(self, name: object) -> bool:
        known = NAMES.get(name, "") if isinstance(name, str) else ""
        return known in SETTINGS or (known in CELERY_ONLY and bool(CELERY_ONLY[known].accepted))

    def __iter__(self) -> Iterator[str]:
        return iter(SETTINGS)

    def __len__(self) -> int:
        return len(SETTINGS)

    def __repr__(self) -> str:
        items = (
            f"{name}={_masked(value, SETTINGS[name].secret)!r}"
            for name, value in self._values.items()
        )
        return f"Config({', '.join(items)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (_plain(self._values),)

    # Hidden from type checkers: they would accept any misspelled name otherwise.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Python itself looks up such names, to copy or to show an object.
            if name.startswith("_"):
                raise AttributeError(f"Config has no attribute {name!r}")
            return self[name]

        def __setattr__(self, name: str, value: object) -> None:
            if name == "_values":
                object.__setattr__(self, name, value)
            else:
                self._assign({name: value})


def _check(spelled: str, name: str, value: object) -> object:
    """Return the value in the form in which the setting is read."""
    label = spelled if spelled == name else f"{spelled} ({name})"
    setting = SETTINGS.get(name)
    if setting is None:
        return CELERY_ONLY[name].check(label, value)
    return setting.check(value, spelled=label)


def _consistent(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `values`, or raise a `ConfigError` if two of them contradict each other."""
    lease = values.get("worker_lease", SettingsTable.worker_lease.default)
    heartbeat = values.get("worker_heartbeat", SettingsTable.worker_heartbeat.default)
    # Two renewals have to fit into a lease; otherwise one late renewal loses it.
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


def _masked(value: object, secret: bool) -> object:
    """Return a value of a setting for people: no driver has checked its URLs yet."""
    if isinstance(value, str):
        return shown_url(value) if secret or _ACCOUNT.search(value) else value
    if isinstance(value, Mapping):
        return {key: _masked(item, secret) for key, item in value.items()}
    return value
