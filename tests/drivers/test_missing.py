"""Drivers whose client library is not installed."""

from __future__ import annotations

import pytest

import aiotaskq.drivers
from aiotaskq.drivers import create_backend, create_broker
from aiotaskq.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("redis://h", "pip install 'aiotaskq'"),
        ("redis+cluster://h", "pip install 'aiotaskq'"),
        ("postgresql://h", "pip install 'aiotaskq'"),
        ("amqp://h", "pip install 'aiotaskq[rabbitmq]'"),
    ],
)
def test_what_brings_a_missing_library_is_told(
    url: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> None:
        raise ImportError("no such module", name="library")

    monkeypatch.setattr(aiotaskq.drivers, "import_module", fails)
    for create in (create_broker, create_backend):
        with pytest.raises(ConfigError) as caught:
            create(url, prefix="aiotaskq")
        assert str(caught.value).endswith(
            f"needs the library 'library', which is not installed: {mend}"
        )
