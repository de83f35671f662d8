"""Passwords: no URL, however mistyped, shows one in an error, a `repr` or the name for people."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiotaskq import TaskQueue
from aiotaskq.config import Config
from aiotaskq.drivers.common.url import shown_url
from aiotaskq.errors import AioTaskQError, ConfigError
from tests.servers import free_port

SCHEMES = [
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "redis+cluster",
    "postgresql",
    "postgres",
    "db+postgresql+psycopg2",
    "amqp",
    "amqps",
    "sqlite",
    "memory",
    "rpc",
    "pyamqp",
    "sentinel",
    "mongodb",
]
MISTYPED = [
    "{}:/:s3cret@h",
    "{}//:s3cret@h",
    "{}:s3cret@h/0",
    "{}:/u:s3cret@h:1/0",
    "{}:///u:s3cret@h/0",
    "{}://u:s3cret",
    "{}://:s3cret/0",
    "{}:\\u:s3cret@h",
    " {}://:s3cret@h",
    "{} ://:s3cret@h",
    "{}://u:s3cret\n@h",
    "{}://u:s3cret\x00@h",
    "{}://u%3As3cret@h",
    "{}://u:s3cret@h:1:2/0",
    "{}://u:pw/s3cret@h",
    "{}://u:pw?s3cret@h",
    "{}://u:pw#s3cret@h",
    "{}://u:pw@x/s3cret@h",
    "{}://u:pw[s3cret@h",
    "{}://h/0?password=s3cret",
    "{}://h/0?PASSWORT=s3cret",
    "{}://h/0?s3cret",
    "{}://h/0#s3cret",
    "{}://:s3cret@h;{}://:s3cret@h2",
    ":s3cret@h",
    "u:s3cret@h",
    "s3cret@h",
    "s3cret",
    "://u:s3cret@h",
]


def told(make: Any) -> Iterator[str]:
    """Yield all texts in which an application shows its URLs."""
    try:
        app = make()
        yield from (repr(app), repr(app.conf))
        for driver in app.drivers():
            yield from (repr(driver), getattr(driver, "url", ""))
            for value in vars(driver).values() if driver is not None else ():
                if not isinstance(value, str | dict):  # the URL itself, for `clone`
                    yield repr(value)
    except AioTaskQError as error:
        yield "".join(traceback.format_exception(error))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_mistyped_url_shows_its_password(scheme: str) -> None:
    shown = []
    for form in MISTYPED:
        url = form.replace("{}", scheme)
        makers = (
            lambda url=url: TaskQueue("t", broker=url),
            lambda url=url: TaskQueue("t", broker="memory://", backend=url),
            lambda url=url: TaskQueue("t", broker_url=url),
            lambda url=url: TaskQueue("t", broker="memory://", result_backend=url),
            lambda url=url: TaskQueue("t", outbox_url=url),
            lambda url=url: TaskQueue("t", broker_transport_options={"url": url}),
        )
        for number, make in enumerate(makers):
            shown += [
                f"{url!r}, {number}: {text[-200:]}" for text in told(make) if "s3cret" in text
            ]
    assert not shown, "\n".join(shown)


@pytest.mark.parametrize("name", ["task_default_queue", "imports", "prefix", "task_routes"])
def test_a_url_in_the_wrong_setting_is_not_shown(name: str) -> None:
    for value in ("redis://u:s3cret@h", ["redis://u:s3cret@h"], {"password": {"s3cret": 1}}):
        told = []
        conf = Config({})
        try:
            conf.update({name: value})
        except ConfigError as error:
            told.append(str(error))
        assert "s3cret" not in "".join([*told, repr(conf)])


def test_a_url_in_place_of_the_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="a URL is given as broker=") as caught:
        TaskQueue("redis://u:s3cret@h")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://u:pw@h:1/0?a=b&token=pw", "redis://u:***@h:1/0?a=b&token=***"),
        ("redis://h", "redis://h"),
        ("amqp://u:p@ss@[::1]:1/v", "amqp://u:***@[::1]:1/v"),
        ("postgresql://a:1,b:2/d", "postgresql://a:1,b:2/d"),
        ("redis:/:pw@h", "redis:/:***"),
        ("redis//:pw@h", "redis//:***"),
        ("redis://u:pw", "redis://***"),
        ("redispw:x", "***"),
        (":pw@h", "***"),
        ("", "***"),
    ],
)
def test_a_text_that_should_be_a_url_is_shown(text: str, shown: str) -> None:
    assert shown_url(text) == (shown if text else "***")


async def use(driver: Any) -> None:
    await driver.open()
    if hasattr(driver, "load"):  # a result backend, which may open when it is first used
        await driver.load(["a"])


def dead(scheme: str) -> str:
    """Return a URL with a password at which nothing listens."""
    return f"{scheme}://u:s3cret@127.0.0.1:{free_port()}/"


@pytest.mark.parametrize(
    "scheme", ["redis", "redis+sentinel", "redis+cluster", "postgresql", "amqp", "amqps"]
)
async def test_no_error_of_a_client_library_shows_the_password(scheme: str) -> None:
    """Neither do its causes, which tracebacks show."""
    broker, backend = TaskQueue("t", broker=dead(scheme)).drivers()
    assert backend is not None
    for driver in (broker, backend):
        with pytest.raises(AioTaskQError) as caught:
            await asyncio.wait_for(use(driver), 20)
        text = "".join(traceback.format_exception(caught.value))
        assert "s3cret" not in text
        assert "127.0.0.1" in text
        await driver.close()


@pytest.mark.may_block("the client libraries read certificates when they connect")
@pytest.mark.parametrize(
    ("url", "option"),
    [
        ("postgresql://u:s3cret@h/d?sslmode=verify-full&sslrootcert={}", "sslrootcert"),
        ("postgresql://u:s3cret@h/d?sslrootcert={}", "sslrootcert"),
        ("postgresql://u:s3cret@h/d?sslmode=require&sslcert={}", "sslcert"),
        ("postgresql://u:s3cret@h/d?sslmode=require&sslkey={}", "sslkey"),
        ("postgresql://u:s3cret@h/d?sslmode=require&sslcrl={}", "sslcrl"),
        ("rediss://u:s3cret@h?ssl_ca_certs={}", "ssl_ca_certs"),
        ("rediss://u:s3cret@h?ssl_certfile={}", "ssl_certfile"),
        ("rediss://u:s3cret@h?ssl_keyfile={}", "ssl_keyfile"),
        ("rediss://u:s3cret@h?ssl_ca_path={}", "ssl_ca_path"),
        ("rediss+sentinel://u:s3cret@h?ssl_ca_certs={}", "ssl_ca_certs"),
        ("rediss+cluster://u:s3cret@h?ssl_ca_certs={}", "ssl_ca_certs"),
        ("amqps://u:s3cret@h?cafile={}", "certificate"),
        ("amqps://u:s3cret@h?certfile={}", "certificate"),
    ],
)
@pytest.mark.parametrize("contents", [None, "", "no certificate"])
async def test_a_certificate_that_cannot_be_read_is_a_mistake_in_the_url(
    tmp_path: Path, url: str, option: str, contents: str | None
) -> None:
    file = tmp_path / "file.pem"
    if contents is not None:
        file.write_text(contents)
        if option == "sslkey" or option == "ssl_keyfile":
            pytest.skip("a key is read together with its certificate")
    for driver in TaskQueue("t", broker=url.format(file)).drivers():
        assert driver is not None
        with pytest.raises(ConfigError, match=option) as caught:
            await asyncio.wait_for(use(driver), 20)
        assert "s3cret" not in str(caught.value)
        await driver.close()
