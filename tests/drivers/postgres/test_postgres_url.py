"""URLs of PostgreSQL servers: their forms, their options, and their secrets."""

from __future__ import annotations

import traceback

import pytest

from aiotaskq.drivers.postgres import PostgresBackend, PostgresBroker
from aiotaskq.drivers.postgres.url import parse_url
from aiotaskq.errors import ConfigError
from tests.drivers.postgres.tools import Make, outcome


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u:sec@ret/x:@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql:///d?host=/run/x&password=secret", "postgresql:///d?host=/run/x&password=***"),
        ("db+postgresql+psycopg2://u:secret@/d", "postgresql://u:***@/d"),
        (
            "postgres://u:secret@a:1,b:2/d?sslmode=require",
            "postgresql://u:***@a:1,b:2/d?sslmode=require",
        ),
        ("postgresql://h/d?sslpassword=secret", "postgresql://h/d?sslpassword=***"),
        ("postgresql://h/d?PASSWORD=secret", "postgresql://h/d?PASSWORD=***"),
        ("postgresql://h/d?passwd=secret&pwd=secret", "postgresql://h/d?passwd=***&pwd=***"),
        ("postgresql://h/d?my.token=secret", "postgresql://h/d?my.token=***"),
        ("postgresql://h/d?options=-c+my.secret%3Dsecret", "postgresql://h/d?options=***"),
        ("postgresql://h/d?options=-c+geqo%3Doff", "postgresql://h/d?options=-c%20geqo%3Doff"),
        ("postgresql://[::1]:5432,[::2]/d", "postgresql://[::1]:5432,[::2]/d"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    backend = PostgresBackend(url)
    assert backend.url == shown
    assert "secret" not in repr(backend)


def test_user_and_password_are_unquoted() -> None:
    arguments = parse_url("postgresql://u%40x:p%2F%3A@h/d").arguments
    assert (arguments["user"], arguments["password"]) == ("u@x", "p/:")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("postgresql://u:secret@h/d?prepared_statement_cache_size=0", "statement_cache_size=0"),
        ("postgresql://u:secret@h/d?ssl=true", "sslmode=require"),
        ("postgresql://u:secret@h/d?pool_size=3&max_overflow=1", "max_overflow, pool_size"),
        ("postgresql://u:secret@h/d?pool_size=3", "PostgresBroker or PostgresBackend"),
        ("postgresql://u:secret@h/d?channel_binding=require", "channel_binding"),
        ("postgresql://u:secret@h/d?statement_cache_size=secretly", "statement_cache_size"),
        ("postgresql://u:secret@h/d?statement_cache_size=-1", "a whole number, 0 or more"),
        ("postgresql://u:secret@h/d?connect_timeout=-1", "seconds, 0 or more"),
        ("postgresql+odd://u:secret@h/d", "'odd'"),
        ("postgresql://u:secret@h/d?x", "name=value"),
        ("mysql://u:secret@h/d", "postgresql://"),
    ],
)
def test_a_url_that_cannot_be_served_is_refused(url: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PostgresBackend(url)
    assert named in str(caught.value)
    assert "secret@" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h/d?user=u&password=se@cret",
        "postgresql://h:1/d?user=u&password=se@cret",
        "postgresql://u:secret@h/d?sslpassword=se@cret",
        "postgresql://u:secret",
        "postgresql://u:secret/d",
        "postgresql://h:1,u:secret/d",
        "postgresql://h/d?scram_client_key=secret",
        "postgresql://h/d?scram_server_key=secret",
        "postgresql://h/d?oauth_client_secret=secret",
    ],
)
def test_a_url_whose_secret_would_be_shown_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PostgresBackend(url)
    assert "cret" not in "".join(traceback.format_exception(caught.value)).replace("_secret", "")


def test_listen_leads_elsewhere_with_the_same_user_and_database() -> None:
    parsed = parse_url("postgresql://u:secret@pool:6432/d?listen=db:5433&sslmode=require")
    assert parsed.shown == "postgresql://u:***@pool:6432/d?sslmode=require"
    assert parsed.listen is not None
    assert parsed.listen.arguments["dsn"].startswith("postgresql://db:5433/d?sslmode=require")
    assert (parsed.listen.arguments["user"], parsed.listen.arguments["password"]) == ("u", "secret")


@pytest.mark.parametrize("listen", ["", "a/b", "postgresql:%2F%2Fu:secret%40h"])
def test_listen_that_is_no_place_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="listen") as refused:
        PostgresBroker(f"postgresql://h/d?listen={listen}")
    assert "secret" not in str(refused.value)


def test_a_whole_url_to_listen_at_is_an_argument() -> None:
    broker = PostgresBroker("postgresql://h/d", listen_url="postgresql://u:secret@db/d")
    assert broker.clone()._url.listen is not None
    assert "secret" not in repr(broker) + broker.url
    backend = broker.backend()
    assert backend._pool.url.listen is not None


@pytest.mark.parametrize(
    "scheme",
    [
        "postgresql",
        "postgres",
        "db+postgresql",
        "db+postgresql+psycopg2",
        "db+postgresql+psycopg",
        "db+postgresql+asyncpg",
        "postgresql+asyncpg",
    ],
)
async def test_every_form_of_url_is_served(make: Make, postgres_url: str, scheme: str) -> None:
    backend = await make(f"{scheme}{postgres_url.removeprefix('postgresql')}")
    await backend.store([outcome("a")], None)
    assert set(await backend.load(["a"])) == {"a"}
    assert backend.url == postgres_url


async def test_settings_in_the_url_reach_the_server(make: Make, postgres_url: str) -> None:
    backend = await make(
        f"{postgres_url}?application_name=mine&statement_cache_size=0&connect_timeout=9"
    )
    rows = await backend._pool.fetch("SHOW application_name")
    assert rows[0][0] == "mine"
    for _ in range(3):
        await backend.store([outcome("a")], 60)
    assert set(await backend.load(["a"])) == {"a"}


async def test_a_setting_that_the_server_does_not_know_is_named(
    make: Make, postgres_url: str
) -> None:
    with pytest.raises(ConfigError, match="no_such_setting"):
        await make(f"{postgres_url}?no_such_setting=1")
