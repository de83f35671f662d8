"""Drivers of other distributions: found, refused, and no harm to anybody else."""

from __future__ import annotations

import importlib.metadata
import itertools
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aiotaskq import TaskQueue
from aiotaskq.drivers import create_backend, create_broker, entry_points
from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker
from aiotaskq.errors import ConfigError

_numbers = itertools.count()

WORKING = """
from aiotaskq.drivers import Driver
from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker
from aiotaskq.errors import ConfigError

class Broker(MemoryBroker):
    def __init__(self, url, *, prefix, store=None):
        if url.endswith("?odd"):
            raise ConfigError("a shelf has no such option")
        super().__init__(prefix=prefix, store=store)
        self.given = url, prefix

class Backend(MemoryBackend):
    def __init__(self, url, *, prefix, store=None):
        super().__init__(prefix=prefix, store=store)
        self.given = url, prefix

driver = Driver(broker=Broker, backend=Backend)
broker_only = Driver(broker=Broker)
backend_only = Driver(backend=Backend)
"""


class Site:
    """A folder on the import path, into which distributions are put."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(
        self,
        source: str = WORKING,
        *,
        scheme: str = "shelf",
        attribute: str = "driver",
        name: str = "aiotaskq-shelf",
    ) -> str:
        """Put a distribution with one module there; return the name of the module."""
        module = f"shelf_{next(_numbers)}"
        (self.folder / f"{module}.py").write_text(source, encoding="utf-8")
        self.declare(f"[aiotaskq.drivers]\n{scheme} = {module}:{attribute}\n", name=name)
        return module

    def declare(
        self, text: str, *, name: str = "aiotaskq-shelf", metadata: str | None = None
    ) -> None:
        """Put the metadata of a distribution there."""
        info = self.folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text(text, encoding="utf-8")
        known = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        if metadata != "":
            (info / "METADATA").write_text(metadata or known, encoding="utf-8")


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(entry_points, "_loaded", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("shelf_"):
            del sys.modules[name]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(tmp_path)
    return Site(tmp_path)


def broker(url: str = "shelf://a") -> Any:
    return create_broker(url, prefix="p")


def backend(url: str = "shelf://a") -> Any:
    return create_backend(url, prefix="p")


def refusal(url: str = "shelf://a", create: Callable[..., Any] = create_broker) -> str:
    with pytest.raises(ConfigError) as caught:
        create(url, prefix="p")
    text = str(caught.value)
    assert "\n" not in text  # a line of the command line's
    return text


# --- what works ---------------------------------------------------------------------------------


def test_a_distribution_brings_a_broker_and_a_result_backend(site: Site) -> None:
    module = site.put()
    made, kept = broker("shelf://a?x=1"), backend("Shelf://a")
    assert (type(made).__module__, made.given) == (module, ("shelf://a?x=1", "p"))
    assert (type(kept).__module__, kept.given) == (module, ("Shelf://a", "p"))
    assert isinstance(made, MemoryBroker)
    assert isinstance(kept, MemoryBackend)


def test_the_name_of_an_entry_point_may_be_in_upper_case(site: Site) -> None:
    module = site.put(scheme="SHELF")
    assert type(broker("shelf://a")).__module__ == module


def test_an_application_and_its_clones_in_other_threads_use_it(site: Site) -> None:
    module = site.put()
    app = TaskQueue("app", broker="shelf://a", backend="shelf://b")
    with ThreadPoolExecutor(4) as pool:
        made = [future.result() for future in [pool.submit(app.drivers) for _ in range(8)]]
    assert {type(one).__module__ for pair in made for one in pair} == {module}
    assert len({id(one) for pair in made for one in pair}) == 16


def test_it_is_loaded_once_and_metadata_is_read_no_more(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put()
    broker()
    monkeypatch.setattr(importlib.metadata, "distributions", None)
    broker()
    backend()
    create_broker("memory://", prefix="p")


def test_a_failure_is_not_kept(site: Site) -> None:
    assert "no broker for shelf://" in refusal()
    module = site.put("raise ValueError('not now')")
    assert "ValueError: not now" in refusal()
    (site.folder / f"{module}.py").write_text(
        WORKING + "\n# another size, as the cache goes by it\n"
    )
    importlib.invalidate_caches()
    assert type(broker()).__module__ == module


def test_the_first_distribution_of_a_name_hides_the_others(
    site: Site, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put()
    monkeypatch.syspath_prepend(first := tmp_path_factory.mktemp("first"))
    module = Site(first).put(name="AioTaskQ.Shelf")
    assert type(broker()).__module__ == module


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["memory", "redis", "db+postgresql", "amqp"])
def test_a_built_in_scheme_cannot_be_taken(site: Site, scheme: str) -> None:
    module = site.put(scheme=scheme)
    if scheme == "memory":
        assert type(broker("memory://")) is MemoryBroker
    if scheme == "db+postgresql":  # it has a built-in driver for results alone
        assert "which is for results only; there are memory://" in refusal("db+postgresql://h")
    for create in (create_broker, create_backend):
        text = refusal("gopher://", create)
        assert "aiotaskq-shelf" not in text
    assert module not in sys.modules


@pytest.mark.parametrize("scheme", ["rpc", "disabled"])
def test_schemes_of_the_application_cannot_be_taken(site: Site, scheme: str) -> None:
    module = site.put(scheme=scheme)
    assert f"no broker for {scheme}://" in refusal(f"{scheme}://")
    assert module not in sys.modules


@pytest.mark.parametrize("create", [create_broker, create_backend])
def test_an_unknown_scheme_is_told_all_that_there_are(
    site: Site, create: Callable[..., Any]
) -> None:
    module = site.put()
    broken = site.put("raise ValueError", scheme="attic", name="aiotaskq-attic")
    site.put(scheme="no scheme at all", name="odd")
    text = refusal("gopher://h:70/?password=hidden", create)
    role = "broker" if create is create_broker else "result backend"
    assert text.startswith(f"no {role} for gopher://; there are memory://, sqlite://, redis://")
    assert text.endswith(", attic:// (from aiotaskq-attic), shelf:// (from aiotaskq-shelf)")
    assert "hidden" not in text
    assert not {module, broken} & set(sys.modules)


@pytest.mark.parametrize(
    "url", ["", "localhost", "u:hidden@h", "hidden@h://x", "://hidden", "1x://"]
)
def test_what_is_no_url_is_refused_and_not_shown(url: str) -> None:
    assert refusal(url) == "the URL of the broker does not begin with a scheme and ://"


def test_two_distributions_cannot_have_one_scheme(site: Site) -> None:
    modules = [site.put(name=name) for name in ("aiotaskq-one", "aiotaskq-two")]
    text = refusal()
    assert "several drivers for shelf://" in text
    for module, name in zip(modules, ("aiotaskq-one", "aiotaskq-two"), strict=True):
        assert f"'shelf = {module}:driver' of the distribution {name} 1.0" in text
    assert text.endswith("uninstall all but one of them")
    assert "shelf:// (from aiotaskq-" in refusal("gopher://")
    assert not set(modules) & set(sys.modules)


def test_one_distribution_cannot_claim_a_scheme_twice(site: Site) -> None:
    site.declare("[aiotaskq.drivers]\nshelf = a:driver\nSHELF = b:driver\n")
    text = refusal()
    assert "'shelf = a:driver'" in text
    assert "'SHELF = b:driver'" in text


BROKEN = {
    "a module that is not there": ("import not_there_at_all", "driver", "No module named"),
    "a name that is not there": (WORKING, "drivre", "AttributeError: .*drivre"),
    "an error": ("raise ValueError('one\\ntwo')", "driver", "ValueError: one two"),
    "a syntax error": ("def", "driver", "SyntaxError"),
    "an exit": ("import sys; sys.exit(3)", "driver", "SystemExit: 3"),
    "an error without words": (
        "class Odd(Exception):\n    def __str__(self): raise TypeError\nraise Odd",
        "driver",
        r"Odd: <exception str\(\) failed>",
    ),
    "another object": (
        "driver = {}",
        "driver",
        "names a dict, but it must name an aiotaskq.drivers",
    ),
    "a class": (WORKING, "Broker", "names a type, but it must name an aiotaskq.drivers.Driver"),
    "nothing in it": (
        "from aiotaskq.drivers import Driver\ndriver = Driver()",
        "driver",
        "names a Driver without the class",
    ),
    "no class in it": (
        "from aiotaskq.drivers import Driver\ndriver = Driver(broker='here')",
        "driver",
        "names a Driver without the class",
    ),
}


@pytest.mark.parametrize(("source", "attribute", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_one_is_told_with_its_distribution_and_the_mend(
    site: Site, source: str, attribute: str, why: str
) -> None:
    module = site.put(source, attribute=attribute)
    for create in (create_broker, create_backend):
        with pytest.raises(ConfigError, match=why) as caught:
            create("shelf://u:hidden@h", prefix="p")
        text = str(caught.value)
        assert f"'shelf = {module}:{attribute}' of the distribution aiotaskq-shelf 1.0" in text
        assert text.endswith("or uninstall it: pip uninstall aiotaskq-shelf")
        assert "hidden" not in text
        assert "\n" not in text


def test_a_broken_one_costs_no_other_scheme(site: Site) -> None:
    site.put("raise ValueError", scheme="attic", name="aiotaskq-attic")
    site.declare("[aiotaskq.drivers]\nno equals sign\n", name="unreadable")
    site.declare("[aiotaskq.drivers]\ncellar = here there: nowhere", name="odd-value")
    site.declare("[aiotaskq.drivers]\n= a:b\n = \n", name="odd-names")
    (site.folder / "half-1.0.dist-info").mkdir()
    module = site.put()
    assert type(broker()).__module__ == module
    assert type(create_broker("memory://", prefix="p")) is MemoryBroker
    assert "cellar" in refusal("cellar://")
    assert "shelf:// (from aiotaskq-shelf)" in refusal("gopher://")


@pytest.mark.parametrize("metadata", ["", "Metadata-Version: 2.1\n", "\x00\xff"])
def test_one_without_a_name_is_told_by_its_place(site: Site, metadata: str) -> None:
    site.declare("[aiotaskq.drivers]\nshelf = nowhere_at_all:driver\n", metadata=metadata)
    text = refusal()
    assert str(site.folder) in text
    assert "No module named 'nowhere_at_all'" in text
    assert text.endswith("repair it or remove it")


@pytest.mark.parametrize(
    ("attribute", "create", "words"),
    [
        (
            "broker_only",
            create_backend,
            "no result backend for shelf://: .* provides a broker only",
        ),
        (
            "backend_only",
            create_broker,
            "no broker for shelf://: .* provides a result backend only",
        ),
    ],
)
def test_a_driver_may_be_one_half_and_says_so(
    site: Site, attribute: str, create: Callable[..., Any], words: str
) -> None:
    site.put(attribute=attribute)
    with pytest.raises(ConfigError, match=words) as caught:
        create("shelf://a", prefix="p")
    assert "aiotaskq-shelf 1.0" in str(caught.value)
    other = create_broker if create is create_backend else create_backend
    other("shelf://a", prefix="p")


@pytest.mark.parametrize(
    ("parameters", "body", "error"),
    [
        ("url", "pass", "TypeError"),
        ("url, *, prefix", "raise ValueError(url)", "ValueError"),
    ],
)
def test_a_class_that_fails_is_told_without_the_url(
    site: Site, parameters: str, body: str, error: str
) -> None:
    source = f"""
from aiotaskq.drivers import Driver

class Broker:
    def __init__(self, {parameters}):
        {body}

driver = Driver(broker=Broker)
"""
    site.put(source)
    text = refusal("shelf://u:hidden@h")
    assert f"aiotaskq-shelf 1.0 raises {error} instead of creating one" in text
    assert "hidden" not in text


def test_what_a_driver_says_of_its_url_is_passed_on(site: Site) -> None:
    site.put()
    assert refusal("shelf://a?odd") == "a shelf has no such option"


@pytest.mark.parametrize("create", [create_broker, create_backend])
def test_a_driver_of_another_version_is_told_what_it_lacks(
    site: Site, create: Callable[..., Any]
) -> None:
    source = """
from aiotaskq.drivers import Driver

class Old:
    def __init__(self, url, *, prefix): pass
    def clone(self): pass

driver = Driver(broker=Old, backend=Old)
"""
    site.put(source)
    text = refusal(create=create)
    assert "creates a Old without " in text
    assert "close, " in text
    assert "clone" not in text
    assert ("traits" if create is create_broker else "wants_arguments") in text


# --- what it costs ------------------------------------------------------------------------------


def run(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_built_in_schemes_read_no_metadata(site: Site) -> None:
    site.put()
    program = """
        import sys
        from aiotaskq import TaskQueue
        TaskQueue("t", broker="memory://", backend="sqlite:///a.db").drivers()
        print("importlib.metadata" in sys.modules)
    """
    assert run(program, site.folder) == "False"


def test_a_child_that_is_forked_while_a_driver_is_loaded_can_load_it(site: Site) -> None:
    site.put(f"import time; time.sleep(0.5)\n{WORKING}")
    program = """
        import os, sys, threading, time
        from aiotaskq.drivers import create_broker

        def load():
            create_broker("shelf://a", prefix="p")

        loading = threading.Thread(target=load)
        loading.start()
        while not any(name.startswith("shelf_") for name in sys.modules):
            time.sleep(0.01)
        child = os.fork()
        load()
        if child == 0:
            os._exit(0)
        loading.join()
        print(os.waitpid(child, 0)[1])
    """
    assert run(program, site.folder) == "0"
