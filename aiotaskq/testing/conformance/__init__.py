"""Conformance suites: one test or more for each sentence of the contracts of drivers.

Each module has the tests of one subject as a mixin; `broker` and `results` combine them. A test is
skipped only where the driver lacks a trait, or where the harness cannot do what the test needs.

==================  ============================================================================
`harness`           the protocols of the harness that a driver's tests give
`rig`               brokers and consumers of one test, and the fixtures that all parts share
`result_listener`   a subscriber to outcomes, beside the test
==================  ============================================================================
"""

from __future__ import annotations

import pkgutil

import pytest

# Before the suites are imported: pytest explains their plain asserts as it does those of tests.
pytest.register_assert_rewrite(
    *(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__))
)
