"""The driver of `examples/folder_driver`: the tests that its author runs, and that it never blocks.

Its package and its tests are found by `pythonpath` in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Iterator

import aiotaskq_folder
import pytest
from blockbuster import BlockBuster
from test_folder import (  # noqa: F401 - what pytest finds here it runs here
    TestFolderBackend,
    TestFolderBroker,
    harness,
    test_random_histories_agree_with_the_model,
)

import aiotaskq.testing

pytestmark = [
    pytest.mark.may_block("the fixture below looks at both packages"),
    pytest.mark.timeout(600),  # a machine may be busy, and a history is long
]


@pytest.fixture(autouse=True)
def nothing_of_the_driver_blocks() -> Iterator[None]:
    blocking = BlockBuster(
        scanned_modules=["aiotaskq", aiotaskq_folder], excluded_modules=[aiotaskq.testing]
    )
    blocking.activate()
    yield
    blocking.deactivate()
