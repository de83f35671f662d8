"""What proves a driver: conformance suites and a model, for pytest.

A driver's test file gives a harness and nothing else::

    class TestMyBroker(BrokerConformance):
        @pytest.fixture
        async def harness(self):
            harness = MyHarness()
            yield harness
            await harness.close()

======================  =========================================================
`testing.brokers`       `BrokerHarness`, `BrokerConformance`
`testing.results`       `ResultHarness`, `ResultConformance`
`testing.schedules`     `ScheduleTests`, the part of `BrokerConformance` about schedules
`testing.model`         `check_broker`, random histories against a model (Hypothesis)
`testing.flaky`         `FlakyBroker`, which fails at a call of your choice, for users of drivers
======================  =========================================================

The suites need pytest and pytest-asyncio in its auto mode.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aiotaskq.testing.brokers import BrokerConformance, BrokerHarness
    from aiotaskq.testing.model import check_broker
    from aiotaskq.testing.results import ResultConformance, ResultHarness

__all__ = [
    "BrokerConformance",
    "BrokerHarness",
    "ResultConformance",
    "ResultHarness",
    "check_broker",
]

_MODULES = {
    "BrokerConformance": "brokers",
    "BrokerHarness": "brokers",
    "ResultConformance": "results",
    "ResultHarness": "results",
    "check_broker": "model",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: not all need Hypothesis."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


# Before the suites are imported: their plain asserts are to explain themselves as a test's do.
pytest.register_assert_rewrite(
    "aiotaskq.testing.brokers",
    "aiotaskq.testing.cancelling",
    "aiotaskq.testing.clocks",
    "aiotaskq.testing.deaths",
    "aiotaskq.testing.ear",
    "aiotaskq.testing.flaky",
    "aiotaskq.testing.leases",
    "aiotaskq.testing.letters",
    "aiotaskq.testing.model",
    "aiotaskq.testing.outages",
    "aiotaskq.testing.publishing",
    "aiotaskq.testing.results",
    "aiotaskq.testing.rig",
    "aiotaskq.testing.rules",
    "aiotaskq.testing.schedules",
    "aiotaskq.testing.shadow",
    "aiotaskq.testing.steps",
    "aiotaskq.testing.suspects",
)
