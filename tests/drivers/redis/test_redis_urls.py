"""Redis URLs: their parts and options, refused ones, and the form without secrets."""

from __future__ import annotations

import pytest

from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.drivers.redis.url import parse_url
from aiotaskq.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://", "redis://"),
        ("redis://host:1/2", "redis://host:1/2"),
        ("redis://user:s%40crt@host/1?db=3", "redis://user:***@host/1?db=3"),
        ("rediss://:secret@[::1]:1", "rediss://:***@[::1]:1"),
        ("rediss://h?ssl_password=secret", "rediss://h?ssl_password=***"),
        ("unix://:secret@/run/redis.sock?db=2", "unix://:***@/run/redis.sock?db=2"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert RedisBroker(url).url == RedisBackend(url).url == shown


def test_the_parts_of_a_url_are_read() -> None:
    options = parse_url("rediss://us%3Aer:p%40ss@host:1/2?ssl_cert_reqs=CERT_NONE").options
    assert options["username"] == "us:er"
    assert options["password"] == "p@ss"
    assert (options["host"], options["port"], options["db"]) == ("host", 1, 2)
    assert options["ssl_cert_reqs"] == "none"
    assert parse_url("redis://h/1?socket_timeout=0.5&db=7").timeout == 0.5
    assert parse_url("redis://h/1?db=7").options["db"] == 7
    assert parse_url("unix:///a%20b?db=1").options["path"] == "/a b"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("amqp://host", "begins with amqp://, and may begin with redis://, rediss://, unix://"),
        ("redis://host/one", "the path of a Redis URL is the number of a database"),
        ("redis://host:port", "it names hosts as host:port, with a port from 1 to 65535"),
        ("redis://u:p\u2100ss@host", "it has odd characters, or brackets, in it"),
        ("redis://h?socket_timout=1", "did you mean 'socket_timeout'?"),
        ("redis://h?SOCKET_TIMEOUT=1", "did you mean 'socket_timeout'?"),
        ("redis://h/0\n", "it has odd characters, or brackets, in it"),
        ("redis://h?socket_timeout=x", "'x' is not a value of the option 'socket_timeout'"),
        ("redis://h?socket_timeout=-1", "'-1' is not a value of the option 'socket_timeout'"),
        ("redis://h?ssl_ca_certs=x", "has no option 'ssl_ca_certs'; it may have client_name, db,"),
        ("rediss://h?ssl_check_hostname=maybe", "'maybe' is not a value"),
        ("unix://", "names the path of a socket"),
    ],
)
def test_a_wrong_url_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        RedisBroker(url)
    assert reason in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel"])
@pytest.mark.parametrize("sign", "/?#")
@pytest.mark.parametrize("half", ["s3c", "7"])
def test_a_password_that_is_not_quoted_is_refused_and_not_shown(
    scheme: str, sign: str, half: str
) -> None:
    with pytest.raises(ConfigError, match="the password, before the @, are quoted") as caught:
        RedisBroker(f"{scheme}://user:{half}{sign}r3t@host:1/0")
    assert half not in str(caught.value)
    assert "r3t" not in str(caught.value)
