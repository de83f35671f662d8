"""Redefinition of a task: the same function, defined anew.

A module that is reloaded, the cell of a notebook that is run twice and a shell define a function
again, and the new one takes the place of the old. Two functions that have one name by mistake are
told from that by the places of their definitions.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any


def source(fn: Callable[..., Any]) -> str:
    """Return the place of the definition of a function, for an error."""
    code = _code(fn)
    name = getattr(fn, "__qualname__", repr(fn))
    return name if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def is_redefinition(old: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Return whether a function is an earlier one, defined anew."""
    if old is new or old == new:
        return True
    name = getattr(new, "__qualname__", None)
    before, after = _code(old), _code(new)
    if name is None or name != getattr(old, "__qualname__", None) or not (before and after):
        return False
    same_file = before.co_filename == after.co_filename
    same_line = same_file and before.co_firstlineno == after.co_firstlineno
    if "<locals>" in name:
        # A function that defines it may have been called twice; then both have the same code.
        return same_line and before is not after
    if same_line:
        return True  # also under another name of its module: `__main__` and its own
    if name == "<lambda>" or old.__module__ != new.__module__:
        return False
    # Another cell of a notebook; or the same file, in which the old one is no more.
    return not same_file or not _still_there(before, name)


def _code(fn: Callable[..., Any]) -> CodeType | None:
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _still_there(code: CodeType, name: str) -> bool:
    """Return whether a file, as it is now, has a function of this name in the same line."""
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        return True
    if not lines:  # there is no file: all is one text
        return True
    return (name, code.co_firstlineno) in _functions(tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the functions in a module by their qualified names, and their first lines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min((one.lineno for one in child.decorator_list), default=child.lineno)
            yield f"{prefix}{child.name}", first
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)
