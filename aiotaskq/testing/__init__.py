"""Test tools for pytest: conformance suites, a model and a fuzzer for drivers, and fault injection.

A driver's test file gives a harness and nothing else::

    from aiotaskq.testing import BrokerConformance, check_broker

    class TestMyBroker(BrokerConformance):
        @pytest.fixture
        async def harness(self):
            harness = MyHarness()
            yield harness
            await harness.close()

    def test_random_histories_agree_with_the_model():
        check_broker(MyHarness)

=======================  ========================================================
`BrokerConformance`      the suite of a broker, run on a `BrokerHarness`
`ResultConformance`      the suite of a result backend, run on a `ResultHarness`
`check_broker`           random histories against a model of a broker (Hypothesis)
`FlakyBroker`            a broker that fails at the call that a `FaultPlan` names
=======================  ========================================================

The suites need pytest and pytest-asyncio in its auto mode. Each name is imported when it is first
asked for: code that wants one of them needs neither pytest nor Hypothesis for the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiotaskq.testing.conformance.broker import BrokerConformance
    from aiotaskq.testing.conformance.harness import BrokerHarness, LethalHarness, ResultHarness
    from aiotaskq.testing.conformance.results import ResultConformance
    from aiotaskq.testing.faults import FaultKind, FaultPlan, FaultPoint, FlakyBroker
    from aiotaskq.testing.model.check import check_broker

__all__ = [
    "BrokerConformance",
    "BrokerHarness",
    "FaultKind",
    "FaultPlan",
    "FaultPoint",
    "FlakyBroker",
    "LethalHarness",
    "ResultConformance",
    "ResultHarness",
    "check_broker",
]

_MODULES = {
    "BrokerConformance": "conformance.broker",
    "BrokerHarness": "conformance.harness",
    "FaultKind": "faults",
    "FaultPlan": "faults",
    "FaultPoint": "faults",
    "FlakyBroker": "faults",
    "LethalHarness": "conformance.harness",
    "ResultConformance": "conformance.results",
    "ResultHarness": "conformance.harness",
    "check_broker": "model.check",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
