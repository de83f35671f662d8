"""The public names of `aiotaskq.testing`, and the cost of importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aiotaskq import testing
from aiotaskq.testing import BrokerConformance, ResultConformance
from aiotaskq.testing.conformance import rig
from aiotaskq.testing.model import check


def imported(program: str) -> set[str]:
    """Return the modules for suites alone that a program imports."""
    heavy = ("pytest", "hypothesis", "aiotaskq.testing.conformance", "aiotaskq.testing.model")
    program = f"import sys\n{program}\nprint(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_neither_pytest_nor_hypothesis() -> None:
    assert imported("import aiotaskq.testing") == set()


def test_fault_injection_needs_neither_pytest_nor_hypothesis() -> None:
    program = "from aiotaskq.testing import FaultKind, FaultPlan, FaultPoint, FlakyBroker"
    assert imported(program) == set()


def test_the_suites_need_no_hypothesis() -> None:
    program = "from aiotaskq.testing import BrokerConformance, ResultConformance"
    assert imported(program) == {"pytest", "aiotaskq.testing.conformance"}


def test_every_public_name_is_exported() -> None:
    assert sorted(testing._MODULES) == testing.__all__
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
        assert name in dir(testing)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        testing.nonsense  # noqa: B018


@pytest.mark.parametrize("suite", [BrokerConformance, ResultConformance])
def test_no_part_of_a_suite_hides_a_test_of_another(suite: type) -> None:
    names = [name for part in suite.__bases__ for name in vars(part) if name.startswith("test_")]
    assert len(names) > 30
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("module", [rig, check], ids=lambda module: module.__name__)
def test_pytest_explains_the_asserts_of_the_suites(module: object) -> None:
    loader = getattr(module, "__loader__", None)
    assert type(loader).__name__ == "AssertionRewritingHook"
