"""From what a user types to the `TaskQueue` that is meant."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from types import ModuleType

from aiotaskq.app import TaskQueue
from aiotaskq.errors import ConfigError

_USUAL_MODULES = ("app", "tasks", "celery", "queue", "worker")  # where a package may keep its app


def find_app(target: str) -> TaskQueue:
    """Import the application that ``module:name`` or ``module`` names.

    With a module or package alone, the one `TaskQueue` in it is meant.

    Raises:
        ConfigError: There is no such module, it cannot be imported, or there is no such
            application in it, or more than one.
    """
    module_name, separator, name = target.partition(":")
    if not module_name or (separator and not name):
        raise ConfigError(f"{target!r} names no application; write it as module:name, tasks:app")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _import(module_name)
    return _named(module, name) if name else _only(module)


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"there is no module {error.name!r} in {os.getcwd()} or among the installed ones"
            ) from error
        raise ConfigError(_broken(name, error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module runs arbitrary code; sys.exit() is included
        raise ConfigError(_broken(name, error)) from error


def _broken(name: str, error: BaseException) -> str:
    where = ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        users = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
        if users:
            where = f" ({users[-1].filename}, line {users[-1].lineno})"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"importing {name} fails: {type(error).__name__}: {' '.join(text.split())}{where}"


def _named(module: ModuleType, name: str) -> TaskQueue:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, TaskQueue):
        return found
    candidates = ", ".join(f"{module.__name__}:{known}" for known in _apps(module))
    if found is None:
        raise ConfigError(
            f"{module.__name__} has no {name!r}" + (f"; it has {candidates}" if candidates else "")
        )
    raise ConfigError(
        f"{module.__name__}:{name} is a {type(found).__name__} and no TaskQueue"
        + (f"; there is {candidates}" if candidates else "")
    )


def _only(module: ModuleType) -> TaskQueue:
    found = _apps(module)
    if not found and hasattr(module, "__path__"):
        for part in _USUAL_MODULES:
            try:
                found = _apps(import_module(f"{module.__name__}.{part}"))
            except ModuleNotFoundError as error:
                if error.name != f"{module.__name__}.{part}":
                    raise ConfigError(_broken(f"{module.__name__}.{part}", error)) from error
            if found:
                break
    apps = {id(app): app for app in found.values()}
    if len(apps) == 1:
        return next(iter(apps.values()))
    if not apps:
        raise ConfigError(f"there is no TaskQueue in {module.__name__}: app = TaskQueue(...)")
    names = " or ".join(f"{module.__name__}:{name}" for name in found)
    raise ConfigError(f"{module.__name__} has several: say {names}")


def _apps(module: ModuleType) -> dict[str, TaskQueue]:
    return {name: value for name, value in vars(module).items() if isinstance(value, TaskQueue)}
