"""PostgreSQL over TLS: the server's certificate is checked where the URL says so."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from collections.abc import AsyncGenerator, Iterator
from urllib.parse import quote

import pytest

from aiotaskq.drivers.postgres import PostgresBackend
from aiotaskq.errors import AioTaskQError
from tests.drivers.postgres.tools import outcome
from tests.servers import Certificates, PostgresServer, ServerMissing, Watchdog
from tests.servers.postgres import owner


class SecurePostgres(PostgresServer):
    """A PostgreSQL server with a certificate, that lets the guarded user in over TLS only."""

    def __init__(self, watchdog: Watchdog, certificates: Certificates) -> None:
        super().__init__(watchdog)
        user = owner("postgres")
        for source in (certificates.certificate, certificates.key):
            copy = shutil.copy(source, self.folder / source.name)
            if user is not None:
                os.chown(copy, user.pw_uid, user.pw_gid)
        (self.folder / certificates.key.name).chmod(0o600)
        hba = self.folder / "data" / "pg_hba.conf"
        guarded = f"all {self.guarded_user} 127.0.0.1/32"
        hba.write_text(f"hostssl {guarded} scram-sha-256\nhost {guarded} reject\n{hba.read_text()}")

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1,127.0.0.2",
            "ssl": "on",
            "ssl_cert_file": str(self.folder / "server.pem"),
            "ssl_key_file": str(self.folder / "server.key"),
        }
        given = [part for name in settings for part in ("-c", f"{name}={settings[name]}")]
        return [*super()._command(), *given]


# asyncio leaves a transport unclosed where a handshake fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.may_block("asyncpg reads certificates when it connects"),
]


@pytest.fixture(autouse=True)
def nothing_unclosed_is_left_to_others() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def secure(watchdog: Watchdog, certificates: Certificates) -> Iterator[SecurePostgres]:
    try:
        server = SecurePostgres(watchdog, certificates)
    except ServerMissing as missing:
        pytest.fail(f"{missing} is not installed: run scripts/install-servers", pytrace=False)
    try:
        server.start()
        server.sql(f"GRANT ALL ON SCHEMA public TO {server.guarded_user}")
        yield server
    finally:
        server.close()


async def test_results_are_stored_and_pushed_over_verified_tls(
    secure: SecurePostgres, certificates: Certificates
) -> None:
    trust = f"?sslmode=verify-full&sslrootcert={quote(str(certificates.authority))}"
    backend = PostgresBackend(secure.guarded_url() + trust)
    await backend.open()
    arrivals = backend.subscribe()
    assert isinstance(arrivals, AsyncGenerator)
    assert await anext(arrivals) == []
    assert not await backend.store([outcome("a")], 60.0)
    assert await anext(arrivals)
    assert list(await backend.load(["a"])) == ["a"]
    assert secure.sql(
        "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
        f" WHERE usename = '{secure.guarded_user}'"
    ) == ["t"]
    await arrivals.aclose()
    await backend.close()
    assert secure.guarded_password not in f"{backend.url} {backend!r}"


async def test_a_certificate_of_a_stranger_is_refused(
    secure: SecurePostgres, certificates: Certificates
) -> None:
    trust = f"?sslmode=verify-full&sslrootcert={quote(str(certificates.stranger))}"
    backend = PostgresBackend(secure.guarded_url() + trust)
    with pytest.raises(AioTaskQError, match=r"(?i)certificate") as caught:
        await backend.open()
    assert secure.guarded_password not in repr(caught.value)


async def test_a_certificate_for_another_host_is_refused(
    secure: SecurePostgres, certificates: Certificates
) -> None:
    trust = f"?sslmode=verify-full&sslrootcert={quote(str(certificates.authority))}"
    url = secure.guarded_url().replace("127.0.0.1", "127.0.0.2")
    backend = PostgresBackend(url + trust)
    with pytest.raises(AioTaskQError, match=r"(?i)certificate"):
        await backend.open()


async def test_without_tls_the_server_lets_nobody_in(secure: SecurePostgres) -> None:
    backend = PostgresBackend(f"{secure.guarded_url()}?sslmode=disable")
    with pytest.raises(AioTaskQError) as caught:
        await backend.open()
    assert secure.guarded_password not in repr(caught.value)
