"""RabbitMQ URLs: options, and passwords that no error shows."""

from __future__ import annotations

import pytest

from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("amqp://h?colour=red", "no option 'colour'"),
        ("amqp://h?heartbeat=0", "'0' is not a value"),
        ("amqp://h?queue_type=mirrored", "'mirrored' is not a value"),
        ("amqp://h?cafile=x", "no option 'cafile'"),
        ("amqp://h:port", "not a RabbitMQ URL"),
        ("amqp://a,b:port/", "not a RabbitMQ URL"),
        ("amqp://a,/", "a host is missing"),
        ("amqp://a//;amqp://b//", "name all hosts in one"),
        ("amqp://u:s3cret@a:1//;amqp://u:s3cret@b:2//", "name all hosts in one"),
        ("http://h", "may begin with amqp:// or amqps://"),
    ],
)
def test_a_url_that_is_wrong_is_refused(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RabbitBroker(given)


def test_a_url_may_name_several_hosts() -> None:
    address = parse_url("amqp://user:s3cret@a:5673,b,[::1]:5674/v?timeout=3")
    assert address.hosts == (("a", 5673), ("b", 5672), ("::1", 5674))
    assert address.url == "amqp://user:***@a:5673,b,[::1]:5674/v?timeout=3"
    assert (address.virtual_host, address.timeout) == ("v", 3.0)
    assert parse_url("amqps://").hosts == (("localhost", 5671),)


def test_no_password_is_shown() -> None:
    address = parse_url("amqps://user:s3cret@h/v?certfile=x")
    assert "s3cret" not in repr(address)
    assert address.url == "amqps://user:***@h/v?certfile=x"
    assert "s3cret" not in RabbitBroker("amqp://user:s3cret@h/v").url


@pytest.mark.parametrize(
    "given",
    [
        "amqp://user:12{}s3cret@h/v",
        "amqp://user:s3cret{}12@h/v",
        "amqp://user:s3cret{0}s3cret=s3cret@h/v",
        "amqp://user:12{0}heartbeat=s3cret@h/v",
        "amqp://user:[s3cret{}@h/v",
        "amqp://user:s3cret@h:s3cret{}/v",
    ],
)
@pytest.mark.parametrize("mark", ["/", "?", "#"])
def test_a_password_that_is_not_quoted_is_not_shown(given: str, mark: str) -> None:
    with pytest.raises(ConfigError, match="not a RabbitMQ URL") as caught:
        RabbitBroker(given.format(mark))
    assert "s3cret" not in str(caught.value)
