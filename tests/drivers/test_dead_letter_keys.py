"""Keys of dead letters where these are numbered."""

from __future__ import annotations

import pytest

from aiotaskq.drivers.common.dead_letter_keys import LAST_NUMBER, number_before, number_of_key
from aiotaskq.errors import ConfigError


@pytest.mark.parametrize(
    "key",
    ["", "nonsense", "-1", "1.5", "٣", "1" * 20, " 1", "007", "00", "+7", "1_0", "²", "7\n"],
)
def test_what_is_no_number_is_no_key(key: str) -> None:
    assert number_of_key(key) is None
    with pytest.raises(ConfigError, match="is not the key of a dead letter"):
        number_before(key)


def test_a_key_is_read_and_a_larger_number_than_stores_have_is_the_largest() -> None:
    assert number_of_key("17") == 17
    assert number_of_key("0") == 0
    assert number_of_key("9" * 19) == LAST_NUMBER
    assert number_before(None) == LAST_NUMBER
    assert number_before("3") == 3
