"""Definitions as real code has them: signatures, callables that are no functions, redefinitions."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Required, TypedDict, TypeVar, TypeVarTuple, Unpack
from uuid import UUID

import pytest

from aiotaskq import ConfigError, DuplicateTask, TaskQueue
from aiotaskq.contract.message import Message
from aiotaskq.encoding.codec import Codec
from aiotaskq.errors import DecodeError
from aiotaskq.tasks.arguments import Arguments

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]  # only type checkers know it

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

ONE, TWO = UUID(int=1), UUID(int=2)
THEN = datetime(2026, 1, 2)


@pytest.fixture
async def app() -> AsyncIterator[TaskQueue]:
    app = TaskQueue("app", broker="memory://")
    yield app
    await app.close()


def arrived(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Return the arguments of a call as a worker gets them."""
    codec, arguments = Codec(), Arguments(fn, "t")
    arguments.prepare()
    arguments.check(args, kwargs)
    row, named, _ = codec.pack(args, kwargs, arguments)
    body = codec.encode_message(Message(id="1", task="t", args=row, kwargs=named))
    return arguments.load(codec.decode_message(body), body)


# --- signatures ---------------------------------------------------------------------------------


class Keywords(TypedDict, total=False):
    owner: Required[UUID]
    at: datetime
    note: typing.NotRequired[str]


def with_keywords(x: int, **options: Unpack[Keywords]) -> None: ...


def test_keywords_of_a_typed_dict_are_converted_one_by_one() -> None:
    kwargs = {"owner": ONE, "at": THEN}
    assert arrived(with_keywords, 1, **kwargs) == ((1,), kwargs)


@pytest.mark.parametrize(
    ("kwargs", "problem"), [({"owner": ONE, "other": 1}, "'other'"), ({"at": THEN}, "'owner'")]
)
def test_keywords_that_the_typed_dict_has_not_are_a_type_error(
    kwargs: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        Arguments(with_keywords).check((1,), kwargs)


def test_positional_arguments_of_a_tuple_are_converted_by_their_places() -> None:
    def many(*ids: *tuple[UUID, ...]) -> None: ...
    def some(x: int, *rest: *tuple[int, *tuple[UUID, ...], datetime]) -> None: ...
    def any_of(*rest: *Ts) -> None: ...

    assert arrived(many, ONE, TWO) == ((ONE, TWO), {})
    assert arrived(some, 1, 2, ONE, TWO, THEN) == ((1, 2, ONE, TWO, THEN), {})
    assert arrived(some, 1, 2, THEN) == ((1, 2, THEN), {})
    assert arrived(any_of, 1, THEN) == ((1, THEN), {})


def test_the_parameters_of_another_function_may_be_any() -> None:
    def call(*args: P.args, **kwargs: P.kwargs) -> None: ...  # type: ignore[valid-type]  # as old code has it

    assert arrived(call, 1, x=THEN) == ((1,), {"x": THEN})


def test_a_decorated_function_has_the_parameters_of_the_function_inside() -> None:
    def decorator(fn: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return fn(*args, **kwargs)

        return call

    @decorator
    def inside(x: UUID, *, at: datetime) -> None: ...

    assert arrived(inside, ONE, at=THEN) == ((ONE,), {"at": THEN})


def test_a_default_of_none_means_optional() -> None:
    def send(to: str, cc: str = None, at: datetime = None) -> None: ...  # type: ignore[assignment]  # noqa: RUF013 - as old code has it

    assert arrived(send, "a", None, None) == (("a", None, None), {})
    assert arrived(send, "a", cc="b", at=THEN) == (("a",), {"cc": "b", "at": THEN})
    with pytest.raises(DecodeError, match="'to'"):
        arrived(send, None)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement is new in 3.12")
def test_a_type_statement_may_contain_itself() -> None:
    names: dict[str, Any] = {"UUID": UUID}
    exec(
        "type Json = dict[str, Json] | list[Json] | str | int | None\n"
        "type Tree = list[Tree] | UUID\n"
        "def fn[T](x: Json, y: Tree, z: T) -> T: ...",
        names,
    )
    args = ({"a": [1, None]}, [ONE, [TWO]], THEN)
    assert arrived(names["fn"], *args) == (args, {})


def test_a_result_that_only_type_checkers_know_stops_nothing() -> None:
    def fn(x: int) -> Missing: ...

    arguments = Arguments(fn, "t")
    arguments.prepare()
    codec = Codec()
    raw = codec.encode_result({"a": THEN}, arguments.result())
    assert codec.decode_result(raw, arguments.read_result) == {"a": THEN}


def test_a_parameter_that_only_type_checkers_know_is_named_with_its_task_and_module() -> None:
    def fn(x: int, y: Missing) -> None: ...

    arguments = Arguments(fn, "shop.pay")
    with pytest.raises(ConfigError) as refused:
        arguments.prepare()
    for word in ("'y'", "shop.pay", "test_definitions", "Missing", "TYPE_CHECKING"):
        assert word in str(refused.value)
    # A sender need not know it: the worker says so, or knows it.
    assert b"datetime" in bytes(Codec().pack((1, [THEN]), {}, arguments)[0])


async def test_a_worker_does_not_start_with_a_parameter_that_it_cannot_convert(
    app: TaskQueue,
) -> None:
    @app.task(name="odd")
    def odd(x: memoryview, y: range) -> None: ...

    with pytest.raises(ConfigError, match=r"parameter 'y' of the task odd in .*test_definitions"):
        async with app.worker():
            pass


# --- callables that are no functions ------------------------------------------------------------


async def double(x: int, factor: int = 2) -> int:
    return x * factor


class Doubler:
    def __call__(self, x: UUID) -> str:
        return type(x).__name__

    def method(self, x: UUID) -> str:
        return type(x).__name__


class AsyncDoubler:
    async def __call__(self, x: UUID) -> str:
        return type(x).__name__


class Tools:
    @staticmethod
    def static(x: UUID) -> str:
        return type(x).__name__

    @classmethod
    async def of_the_class(cls, x: UUID) -> str:
        return f"{cls.__name__} {type(x).__name__}"


async def test_what_can_be_called_can_be_a_task_with_a_name(app: TaskQueue) -> None:
    app.task(name="partial")(functools.partial(double, factor=3))
    app.task(name="object")(Doubler())
    app.task(name="async object")(AsyncDoubler())
    app.task(name="method")(Doubler().method)
    app.task(name="static")(Tools.static)
    app.task(name="class method")(Tools.of_the_class)

    class Inside:
        @app.task(name="inside")
        @staticmethod
        def inside(x: UUID) -> str:
            return type(x).__name__

    async with app.worker():
        assert await (await app.send("partial", (2,))).result(30) == 6
        for name in ("object", "async object", "method", "static", "inside"):
            assert await (await app.send(name, (ONE,))).result(30) == "UUID"
        assert await (await app.send("class method", (ONE,))).result(30) == "Tools UUID"
    assert Inside.inside(ONE) == "UUID"


@pytest.mark.parametrize("fn", [functools.partial(double), Doubler()], ids=["partial", "object"])
def test_what_has_no_name_of_its_own_needs_one(app: TaskQueue, fn: Any) -> None:
    with pytest.raises(ConfigError, match="name="):
        app.task(fn)


def test_what_cannot_be_a_task_is_refused(app: TaskQueue) -> None:
    with pytest.raises(ConfigError, match="class method"):
        app.task(vars(Tools)["of_the_class"])
    with pytest.raises(ConfigError, match="no function"):
        app.task(name="x")(Tools)
    with pytest.raises(ConfigError, match="a task already"):
        app.task(app.task(name="one")(double))
    for fn in (functools.partial(Tools.static), Doubler(), Doubler().method):
        with pytest.raises(ConfigError, match="top level"):
            app.task(name="y", executor="process")(fn)


# --- redefinition -------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "redefined.py"
    sys.modules.pop("redefined", None)


def load(app: TaskQueue, module: Path, text: str) -> None:
    """Import a module, or reload it with another text."""
    module.write_text(text)
    importlib.invalidate_caches()
    if "redefined" in sys.modules:
        importlib.reload(sys.modules["redefined"])
        return
    made = types.ModuleType("redefined_app")
    made.app = app  # type: ignore[attr-defined]  # for the module to import
    sys.modules["redefined_app"] = made
    importlib.import_module("redefined")


FIRST = "from redefined_app import app\n\n@app.task\ndef job() -> int:\n    return 1\n"
MOVED = FIRST.replace("\n\n@app", "\n\nx = 5\n\n@app").replace("return 1", "return 2")


def test_a_reloaded_module_replaces_its_tasks(app: TaskQueue, module: Path) -> None:
    for text, value in ((FIRST, 1), (FIRST, 1), (MOVED, 2)):
        load(app, module, text)
        assert app.tasks["redefined.job"].fn() == value
    assert list(app.tasks) == ["redefined.job"]


def test_a_reloaded_module_may_make_its_tasks_in_a_function(app: TaskQueue, module: Path) -> None:
    text = (
        "from redefined_app import app\n\ndef make() -> None:\n"
        "    @app.task\n    def job() -> None: ...\n\nmake()\n"
    )
    load(app, module, text)
    load(app, module, text)
    with pytest.raises(DuplicateTask):
        sys.modules["redefined"].make()


def test_two_functions_of_one_name_in_a_module_are_two(app: TaskQueue, module: Path) -> None:
    second = FIRST.partition("\n\n")[2]
    with pytest.raises(DuplicateTask, match=r"redefined\.py:3"):
        load(app, module, f"{FIRST}\n\n{second}")


def run(app: TaskQueue, cell: str, text: str) -> None:
    exec(compile(text, cell, "exec"), {"app": app, "__name__": "__main__"})


def test_a_cell_of_a_notebook_replaces_its_tasks(app: TaskQueue) -> None:
    text = "@app.task\ndef job(): return {}"
    for cell, value in (("<cell 1>", 1), ("<cell 1>", 1), ("<cell 2>", 2)):
        run(app, cell, text.format(value))
        assert app.tasks["app.job"].fn() == value


def test_another_function_under_a_name_that_is_taken_is_refused(app: TaskQueue) -> None:
    run(app, "<cell 1>", "@app.task(name='one')\ndef job(): ...")
    for text in (
        "@app.task(name='one')\ndef other(): ...",
        "app.task(name='one')(lambda: 1)",
        "import functools\napp.task(name='one')(functools.partial(print))",
    ):
        with pytest.raises(DuplicateTask):
            run(app, "<cell 2>", text)


def test_wrapped_functions_are_told_apart_by_the_functions_inside(
    app: TaskQueue, module: Path
) -> None:
    text = (
        "import functools\nfrom redefined_app import app\n\ndef plainly(fn):\n"
        "    return functools.wraps(fn)(lambda *args: fn(*args))\n\n"
        "@app.task\n@plainly\ndef job(): ...\n\n@app.task\n@plainly\ndef job(): ...\n"
    )
    with pytest.raises(DuplicateTask):
        load(app, module, text)
