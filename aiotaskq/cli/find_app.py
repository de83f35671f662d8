"""Import of the application that a command names, with an error of one line where that fails."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from aiotaskq.app import TaskQueue
from aiotaskq.errors import ConfigError

_OWN_FOLDER = Path(__file__).parent.parent
_USUAL_MODULES = ("app", "tasks", "celery", "queue", "worker")  # of a package, for its application


def find_app(target: str) -> TaskQueue:
    """Import the application that ``module:name`` or ``module`` names.

    A module or package alone names the one `TaskQueue` in it.

    Raises:
        ConfigError: There is no such module, it cannot be imported, or there is no such
            application in it, or more than one.
    """
    module_name, separator, name = target.partition(":")
    if not module_name or (separator and not name):
        raise ConfigError(f"{target!r} names no application; write it as module:name, tasks:app")
    if "/" in module_name or module_name.endswith(".py"):
        meant = module_name.removesuffix(".py").lstrip("./").replace("/", ".")
        raise ConfigError(
            f"{module_name} is a file; write the module's name: {meant}:{name or 'app'}"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _import(module_name)
    return _get_app(module, name) if name else _find_only_app(module)


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"there is no module {error.name!r} in {Path.cwd()} or among the installed ones"
            ) from error
        raise ConfigError(_describe_failure(name, error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module runs arbitrary code; sys.exit() is included
        raise ConfigError(_describe_failure(name, error)) from error


def import_tasks(app: TaskQueue) -> None:
    """Import the modules that the settings of an application name.

    Raises:
        ConfigError: One of them does not exist or cannot be imported.
    """
    try:
        app.import_tasks()
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:  # as in `_import`
        raise ConfigError(_describe_failure("what the setting imports names", error)) from error


def _describe_failure(name: str, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        file, line, text = error.filename, error.lineno, error.msg
    else:
        file, line = _failed_line(error)
        text = str(error)
    what = " ".join(text.split())
    if not isinstance(error, ConfigError):
        what = f"{type(error).__name__}: {what}"
    return f"importing {name} fails: {what}" + (f" ({file}, line {line})" if file else "")


def _failed_line(error: BaseException) -> tuple[str | None, int | None]:
    """Return the innermost line of the user's own code that led to an error."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename
        and not Path(frame.filename).is_relative_to(_OWN_FOLDER)
    ]
    libraries = ("site-packages", sysconfig.get_path("stdlib"))
    own = [f for f in frames if not any(part in f.filename for part in libraries)] or frames
    return (own[-1].filename, own[-1].lineno) if own else (None, None)


def _get_app(module: ModuleType, name: str) -> TaskQueue:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, TaskQueue):
        return found
    candidates = ", ".join(f"{module.__name__}:{known}" for known in _apps_in(module))
    if found is None:
        raise ConfigError(
            f"{module.__name__} has no {name!r}" + (f"; it has {candidates}" if candidates else "")
        )
    raise ConfigError(
        f"{module.__name__}:{name} is a {type(found).__name__} and no TaskQueue"
        + (f"; there is {candidates}" if candidates else "")
    )


def _find_only_app(module: ModuleType) -> TaskQueue:
    found = _apps_in(module)
    if not found and hasattr(module, "__path__"):
        for part in _USUAL_MODULES:
            name = f"{module.__name__}.{part}"
            if not found and find_spec(name) is not None:
                found = _apps_in(_import(name))
    apps = {id(app): app for app in found.values()}
    if len(apps) == 1:
        return next(iter(apps.values()))
    if not apps:
        raise ConfigError(f"there is no TaskQueue in {module.__name__}: app = TaskQueue(...)")
    names = " or ".join(f"{module.__name__}:{name}" for name in found)
    raise ConfigError(f"{module.__name__} has several: say {names}")


def _apps_in(module: ModuleType) -> dict[str, TaskQueue]:
    return {name: value for name, value in vars(module).items() if isinstance(value, TaskQueue)}
