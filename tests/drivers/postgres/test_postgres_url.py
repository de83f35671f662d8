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
        ("postgresql://u:sec@ret:@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u%3Asecret@h/d", "postgresql://***@h/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql:///d?host=/run/x&password=secret", "postgresql:///d?host=/run/x&password=***"),
        ("db+postgresql+psycopg2://u:secret@/d", "postgresql://u:***@/d"),
        (
            "postgres://u:secret@a:1,b:2/d?sslmode=require",
            "postgresql://u:***@a:1,b:2/d?sslmode=require",
        ),
        ("postgresql://h/d?sslpassword=secret", "postgresql://h/d?sslpassword=***"),
        ("postgresql://h/d?my.token=secret", "postgresql://h/d?my.token=***"),
        ("postgresql://h/d?options=-c+my.secret%3Dsecret", "postgresql://h/d?options=***"),
        ("postgresql://h/d?options=-c+geqo%3Doff", "postgresql://h/d?options=-c%20geqo%3Doff"),
        ("postgresql://[::1]:5432,[::2]/d", "postgresql://[::1]:5432,[::2]/d"),
        ("postgresql://a:1,[::2]:2/d", "postgresql://a:1,[::2]:2/d"),
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
        ("postgresql://u:secret@h/d?PASSWORD=secret", "did you mean 'password'?"),
        ("postgresql://u:secret@h/d?pasword=secret", "did you mean 'password'?"),
        ("postgresql://u:secret@h/d?sslmod=require", "no option 'sslmod'; did you mean 'sslmode'?"),
        ("postgresql://u:secret@h/d?SSLMODE=require", "did you mean 'sslmode'?"),
        ("postgresql://u:secret@h/d?ssl_mode=require", "did you mean 'sslmode'?"),
        ("postgresql://u:secret@h/d?ssl_root_cert=x", "did you mean 'sslrootcert'?"),
        ("postgresql://u:secret@h/d?serch_path=x", "did you mean 'search_path'?"),
        ("postgresql://u:secret@h/d?zzz=1", "options=-c%20name%3Dvalue"),
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
        "postgresql://u:sec/ret@h/d",
        "postgresql://u:sec?ret@h/d",
        "postgresql://u:sec#ret@h/d",
        "postgresql://u:sec@/ret@h/d",
        "postgresql://u:sec@x?ret@h/d",
        "postgresql://u:sec@x?sslmode=ret@h/d#cret",
        "postgresql://u:sec@x#ret@h/d",
        "postgresql://u:1/secret@h/d",
        "postgresql://u:1?a=secret@h/d",
        "postgresql://u:1?application_name=secret@h/d",
        "postgresql://u:1#secret@h/d",
        "postgresql://u:secret\n@h/d",
        "postgresql://u:secret @h/d",
        "postgresql:/u:secret@h/d",
        "postgresql:u:secret@h/d",
        "postgresql//u:secret@h/d",
        "postgresql:///u:secret@h/d",
        "db+postgresql:/u:secret@h/d",
        "db+postgresql://u:sec/ret@h/d",
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


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql://app:pw@db/app?application_name=worker@host1", "db"),
        ("postgresql://app:pw@db:5/app?application_name=:x@host1:7/y", "db:5"),
        ("postgresql://app:p@w@db?sslpassword=se@host1", "db"),
        ("db+postgresql+psycopg2://app:pw@db/app?application_name=a@host1", "db"),
        ("postgres://app:pw@a:1,b:2/app?application_name=w@c", "a:1,b:2"),
    ],
)
def test_nothing_behind_the_hosts_changes_where_the_password_goes(url: str, hosts: str) -> None:
    arguments = parse_url(url).arguments
    assert arguments["dsn"].removeprefix("postgresql://").split("/")[0].split("?")[0] == hosts
    assert arguments["password"] in ("pw", "p@w")
    assert arguments["user"] == "app"
    assert "host1" not in arguments["dsn"].partition("?")[0]


async def test_asyncpg_connects_to_the_host_before_the_options(postgres_url: str) -> None:
    backend = PostgresBackend(f"{postgres_url}?application_name=worker@host1")
    await backend.open()
    rows = await backend._pool.fetch("SHOW application_name")
    await backend.close()
    assert rows[0][0] == "worker@host1"


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


@pytest.mark.parametrize("query", ["no_such_setting=1", "options=-cno_such_setting%3D1"])
async def test_a_setting_that_the_server_does_not_know_is_named(
    make: Make, postgres_url: str, query: str
) -> None:
    with pytest.raises(ConfigError, match="no_such_setting"):
        await make(f"{postgres_url}?{query}")
