"""A model of a broker, and random histories that compare a driver with it (needs Hypothesis).

==========  =====================================================================================
`check`     `check_broker`, which plays the histories
`rules`     the steps of a history: each calls the broker, and tells the model
`machine`   the state that the rules share, and the checks that they have in common
`state`     the model: copies of messages, consumers, and what must hold of them
==========  =====================================================================================
"""

from __future__ import annotations

import pkgutil

import pytest

# Before these modules are imported: pytest explains their plain asserts as it does those of tests.
pytest.register_assert_rewrite(
    *(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__))
)
