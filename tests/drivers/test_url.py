"""URLs of all drivers: the common rules."""

from __future__ import annotations

from urllib.parse import SplitResult

import pytest

from aiotaskq.drivers.common.url import (
    Reader,
    host_and_port,
    is_secret,
    masked_query,
    masked_url,
    one_of,
    read_count,
    read_flag,
    read_option,
    read_options,
    read_seconds,
    read_seconds_or_zero,
    split_url,
)
from aiotaskq.errors import ConfigError

READERS: dict[str, Reader] = {
    "flag": read_flag,
    "seconds": read_seconds,
    "pause": read_seconds_or_zero,
    "count": read_count,
    "ssl_password": str,
}


def split(url: str) -> SplitResult:
    return split_url(url, system="Redis", schemes=("redis", "unix"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost/0", "redis://localhost/0"),
        ("redis://me:secret@localhost:1/0", "redis://me:***@localhost:1/0"),
        ("redis://:secret@localhost", "redis://:***@localhost"),
        ("redis://me@localhost", "redis://me@localhost"),
        ("redis://h?ssl_password=a%26b&count=3", "redis://h?ssl_password=***&count=3"),
        ("unix:///run/redis.sock?flag=yes", "unix:///run/redis.sock?flag=yes"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url: str, shown: str) -> None:
    assert masked_url(split(url)) == shown


@pytest.mark.parametrize("mark", ["/", "?", "#", "?x=y&", "/1?z=", "#?", "[", "]"])
def test_no_error_shows_a_part_of_a_password_that_is_not_quoted(mark: str) -> None:
    with pytest.raises(ConfigError, match="not a Redis URL") as caught:
        split(f"redis://me:hush{mark}tail@localhost/0")
    assert "hush" not in str(caught.value)
    assert "tail" not in str(caught.value)


def test_another_scheme_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="begins with http://, and may begin with redis:// or un"):
        split("http://localhost")
    with pytest.raises(ConfigError, match="begins with nothing://"):
        split("localhost")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ("localhost", 6379)),
        ("host", ("host", 6379)),
        ("host:", ("host", 6379)),
        (":1", ("localhost", 1)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[::1]", ("::1", 6379)),
        ("[::1]:7", ("::1", 7)),
        ("a%2Db:7", ("a-b", 7)),
        ("me:hush@host:7", ("host", 7)),
    ],
)
def test_a_host_and_a_port_are_read(text: str, place: tuple[str, int]) -> None:
    assert host_and_port(text, 6379, system="Redis") == place


@pytest.mark.parametrize(
    "text", ["h:hush", "h:-1", "h:65536", "h:1:hush", "[hush", "::1", "[hush]:1"]
)
def test_a_wrong_port_or_host_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="not a Redis URL: it names hosts as host:port") as caught:
        host_and_port(text, 6379, system="Redis")
    assert "hush" not in str(caught.value)


def test_options_are_read() -> None:
    parts = split("redis://h?flag=No&seconds=1.5&pause=0&count=3&ssl_password=x")
    assert read_options(parts, READERS) == {
        "flag": False,
        "seconds": 1.5,
        "pause": 0.0,
        "count": 3,
        "ssl_password": "x",
    }


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("colour=red", "no option 'colour'; it may have count, flag, pause, seconds, ssl_password"),
        ("flag=maybe", "'maybe' is not a value of the option 'flag'; it must be true or false"),
        ("seconds=0", "it must be seconds, more than 0"),
        ("seconds=nan", "it must be seconds, more than 0"),
        ("seconds=soon", "it must be seconds, more than 0"),
        ("pause=-1", "it must be seconds, 0 or more"),
        ("pause=inf", "it must be seconds, 0 or more"),
        ("pause=soon", "it must be seconds, 0 or more"),
        ("count=-1", "it must be a whole number, 0 or more"),
        ("count=", "it must be a whole number, 0 or more"),
    ],
)
def test_a_wrong_option_is_refused_with_what_there_is(query: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(split(f"redis://h?{query}"), READERS)
    assert said in str(caught.value)


def test_the_value_of_a_secret_option_is_never_shown() -> None:
    def refuse(_: str) -> str:
        raise ValueError

    parts = split("redis://h?ssl_password=hush")
    with pytest.raises(ConfigError, match=r"^\*\*\* is not a value of the option") as caught:
        read_options(parts, {"ssl_password": refuse})
    assert "hush" not in str(caught.value)
    assert all(map(is_secret, ("sslpassword", "Passwd", "pwd", "client_secret")))
    assert masked_query([("sslpassword", "hush"), ("a b", "1,2")]) == "sslpassword=***&a%20b=1,2"


def test_one_option_is_read_by_itself() -> None:
    assert read_option("count", "3", read_count) == 3
    with pytest.raises(ConfigError, match="'x' is not a value of the option 'count'; it must be a"):
        read_option("count", "x", read_count)


def test_one_of_several_names_in_any_case() -> None:
    read = one_of("quorum", "classic")
    assert read("Classic") == "classic"
    with pytest.raises(ValueError, match="quorum or classic"):
        read("other")
