"""Reading settings from mappings, modules, classes, objects and environment variables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from importlib import import_module
from types import ModuleType
from typing import Any, TypeAlias

from aiotaskq.config.celery import CELERY_ONLY, OLD_STARTS
from aiotaskq.config.names import LOWER_NAMES, NAMES, nearest, resolve, unknown
from aiotaskq.config.service_links import is_service_link
from aiotaskq.config.settings import SETTINGS
from aiotaskq.errors import ConfigError

FoundSetting: TypeAlias = tuple[str, str, object]
"""A setting as the user spelled it, its lower-case name, and the value."""

# A lower-case name that begins so is a setting, or a misspelled one.
_NEW_STARTS = ("accept_", "beat_", "broker_", "result_", "task_", "worker_")
# The types of values that settings have. Any other object in a module (a logger, a client, a class)
# is not a misspelled setting, whatever its name.
_PLAIN = (str, bytes, int, float, list, tuple, set, frozenset, Mapping, timedelta, type(None))
# One or two letters differ. A lower limit would refuse constants that are no settings.
_MISSPELT = 0.85

_ENVIRONMENT = "AIOTASKQ_"
_ENVIRONMENT_OF_TESTS = "AIOTASKQ_TESTS_"


def read_items(items: Iterable[tuple[object, object]]) -> Iterator[FoundSetting]:
    """Yield the settings of a mapping, in which every name has to be one.

    Raises:
        UnknownSetting: A name is not a setting.
    """
    for spelled, value in items:
        yield str(spelled), resolve(spelled), value


def read_source(source: object, namespace: str | None) -> Iterator[FoundSetting]:
    """Yield the settings in a source, as described at `Config.load`.

    Raises:
        ConfigError: There is no such source, or a name in it looks like a misspelled setting.
    """
    if isinstance(source, str):
        source = _find(source)
    if isinstance(source, _PLAIN) and not isinstance(source, Mapping):
        raise ConfigError(
            f"{source!r} holds no settings; give a module, a class, an object, a mapping, "
            "or the dotted name of one of these"
        )
    if namespace:
        return _read_namespace(source, namespace.rstrip("_") + "_")
    if isinstance(source, Mapping):
        return read_items(source.items())
    return _read_attributes(source)


def read_environment(environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the values set by environment variables, by the names of the settings.

    Raises:
        ConfigError: A variable is for no setting, or its text is not a value of the setting.
    """
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(_ENVIRONMENT) or variable.startswith(_ENVIRONMENT_OF_TESTS):
            continue
        name = variable.removeprefix(_ENVIRONMENT).lower()
        if name not in SETTINGS and is_service_link(variable, environ):
            continue
        if name in CELERY_ONLY:
            raise ConfigError(f"{variable} is not supported: {CELERY_ONLY[name].reason}")
        if name not in SETTINGS:
            close = nearest(name, SETTINGS)
            suggestion = SETTINGS[close].variable if close else None
            raise unknown("environment variable", variable, suggestion)
        # Docker Compose passes a variable that is not set as an empty one.
        if text.strip():
            values[name] = SETTINGS[name].parse(text.strip())
    return values


# --- dotted names -------------------------------------------------------------------------------


def _find(path: str) -> object:
    """Return the module, or the object in a module, with that dotted name."""
    module_name, colon, attributes = path.partition(":")
    if not colon and not _exists(module_name):
        module_name, _, attributes = path.rpartition(".")
    if not _exists(module_name):
        raise ConfigError(f"there is no module {path!r} to load settings from")
    found: object = import_module(module_name)
    for attribute in attributes.split(".") if attributes else ():
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise ConfigError(
                f"there is no {path!r} to load settings from: {module_name} has no {attributes!r}"
            ) from None
    return found


def _exists(module_name: str) -> bool:
    """Import a module; False if there is none of that name."""
    if not all(part.isidentifier() for part in module_name.split(".")):
        return False
    try:
        import_module(module_name)
    except ModuleNotFoundError as error:
        # The missing module may also be one that this module imports. That is a mistake in the
        # module, and its traceback shows where.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        return False
    return True


# --- attributes ---------------------------------------------------------------------------------


def _names_of(source: object) -> Iterable[str]:
    names = vars(source) if isinstance(source, ModuleType) else dir(source)
    return [name for name in names if not name.startswith("_")]


def _read_attributes(source: object) -> Iterator[FoundSetting]:
    for name in _names_of(source):
        if name in NAMES:
            value = getattr(source, name)
            if not _is_definition(name, value):
                yield name, NAMES[name], value
        else:
            _refuse_misspelt(source, name)


def _is_definition(name: str, value: object) -> bool:
    """Return whether an import or a `def` made the name, such as ``from datetime import timezone``.

    A function or a class that is assigned to a setting has a name of its own instead.
    """
    if isinstance(value, ModuleType):
        return value.__name__.rpartition(".")[2] == name
    return callable(value) and getattr(value, "__name__", None) == name


def _refuse_misspelt(source: object, name: str) -> None:
    # The cheap check first: most names in a module are imports.
    if not isinstance(getattr(source, name), _PLAIN) or not _looks_meant(name):
        return
    try:
        resolve(name)
    except ConfigError as error:
        hint = "a helper variable can begin with an underscore"
        raise type(error)(f"{error} ({hint})") from None


def _looks_meant(name: str) -> bool:
    if name.isupper():
        return name.startswith(OLD_STARTS)
    if not name.islower():
        return False
    return name.startswith(_NEW_STARTS) or nearest(name, LOWER_NAMES, _MISSPELT) is not None


def _read_namespace(source: object, start: str) -> Iterator[FoundSetting]:
    """Yield the names that begin with `start`; each of them has to be a setting."""
    names = source if isinstance(source, Mapping) else _names_of(source)
    for name in names:
        if isinstance(name, str) and name.startswith(start):
            value = source[name] if isinstance(source, Mapping) else getattr(source, name)
            yield name, _without(name, start), value


def _without(name: str, start: str) -> str:
    rest = name.removeprefix(start)
    lower = rest.lower()
    # Some old names are used in full, such as CELERY_TASK_RESULT_EXPIRES.
    known = lower if lower in LOWER_NAMES else NAMES.get(name)
    if known is None:
        close = nearest(lower, LOWER_NAMES)
        suggestion = close and start + (close.upper() if rest.isupper() else close)
        raise unknown("setting", name, suggestion)
    return known
