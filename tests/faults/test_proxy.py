"""The faults of the proxy, in front of a server that echoes its input."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import End, Proxy, Way

PATIENCE = 120.0
NOTHING = 0.2  # seconds without a byte


class Echo:
    """An echo server that keeps its input."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.got: list[bytearray] = []
        self.ended = 0
        self.reset = 0
        self._changed = threading.Condition()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()
        return host, port

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def wait_for(self, *got: bytes) -> None:
        wanted = list(map(bytearray, got))
        with self._changed:
            assert self._changed.wait_for(lambda: self.got == wanted, PATIENCE), (wanted, self.got)

    def wait_for_ends(self, *, ended: int = 0, reset: int = 0) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: (self.ended, self.reset) == (ended, reset), PATIENCE
            ), (self.ended, self.reset)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            mine = bytearray()
            self.got.append(mine)
            thread = threading.Thread(target=self._serve, args=(connection, mine))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, mine: bytearray) -> None:
        broken = False
        with connection:
            try:
                while data := connection.recv(65536):
                    with self._changed:
                        mine += data
                        self._changed.notify_all()
                    connection.sendall(data)
            except OSError:
                broken = True
        with self._changed:
            self.reset += broken
            self.ended += not broken
            self._changed.notify_all()


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.address) as proxy:
        yield proxy


def dial(proxy: Proxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=PATIENCE)


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return receive(client, len(data))


def receive(client: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count and (more := client.recv(count - len(got))):
        got += more
    return got


def hears_nothing(client: socket.socket) -> bool:
    client.settimeout(NOTHING)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE)
    return False


def is_reset(client: socket.socket) -> bool:
    try:
        client.recv(1)
    except ConnectionResetError:
        return True
    return False


def is_refused(proxy: Proxy) -> bool:
    try:
        with dial(proxy) as client:  # the server may have noticed it by now
            return is_reset(client)
    except ConnectionResetError:
        return True


def test_without_a_fault_all_bytes_pass_and_are_counted(proxy: Proxy, echo: Echo) -> None:
    big = bytes(range(256)) * 4000
    with dial(proxy) as one, dial(proxy) as two:
        sender = threading.Thread(target=one.sendall, args=(big,))
        sender.start()
        assert receive(one, len(big)) == big
        sender.join()
        assert ask(two, b"hello") == b"hello"
        assert proxy.live == 2
    echo.wait_for_ends(ended=2)
    assert proxy.passed == {Way.UP: len(big) + 5, Way.DOWN: len(big) + 5}
    assert (proxy.connections, proxy.refused, proxy.broken) == (2, 0, 0)


def test_a_client_that_has_said_all_still_hears_the_answer(proxy: Proxy) -> None:
    with dial(proxy) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert receive(client, 100) == b"last words"


def test_a_delay_delays_both_ways_and_ends_with_heal(proxy: Proxy) -> None:
    with dial(proxy) as client:
        proxy.delay(up=0.1, down=0.2)
        began = time.monotonic()
        assert ask(client, b"x") == b"x"
        assert time.monotonic() - began >= 0.3
        proxy.heal()
        assert ask(client, b"y") == b"y"


def test_a_cut_is_an_end_in_order(proxy: Proxy, echo: Echo) -> None:
    with dial(proxy) as client:
        assert ask(client, b"x") == b"x"
        proxy.cut()
        assert client.recv(1) == b""
        echo.wait_for_ends(ended=1)
    with dial(proxy) as client:
        assert ask(client, b"y") == b"y"
    assert proxy.broken == 1


def test_a_reset_is_an_error_on_both_sides(proxy: Proxy, echo: Echo) -> None:
    with dial(proxy) as client:
        assert ask(client, b"x") == b"x"
        proxy.reset()
        assert is_reset(client)
        echo.wait_for_ends(reset=1)
    with dial(proxy) as client:
        assert ask(client, b"y") == b"y"


def test_refusing_resets_new_connections_until_healed(proxy: Proxy) -> None:
    proxy.refuse()
    assert is_refused(proxy)
    proxy.heal()
    with dial(proxy) as client:
        assert ask(client, b"y") == b"y"


@pytest.mark.parametrize("end", End)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_request_ends_after_so_many_bytes(proxy: Proxy, echo: Echo, count: int, end: End) -> None:
    with dial(proxy) as client:
        assert ask(client, b"before") == b"before"
        proxy.break_after(count, Way.UP, end)
        client.sendall(b"request")
        assert is_reset(client) is (end is End.RESET)
        echo.wait_for(b"before" + b"request"[:count])
        assert not proxy.armed
    with dial(proxy) as client:  # once
        assert ask(client, b"another") == b"another"


@pytest.mark.parametrize("end", End)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_answer_ends_after_so_many_bytes(proxy: Proxy, echo: Echo, count: int, end: End) -> None:
    with dial(proxy) as client:
        proxy.break_after(count, Way.DOWN, end)
        client.sendall(b"request")
        assert receive(client, count) == b"request"[:count]
        assert is_reset(client) is (end is End.RESET)
        echo.wait_for(b"request")


def test_the_bytes_of_a_break_count_over_connections(proxy: Proxy) -> None:
    with dial(proxy) as one, dial(proxy) as two:
        proxy.break_after(7, Way.UP)
        assert ask(one, b"1234") == b"1234"
        assert ask(two, b"567") == b"567"
        one.sendall(b"8")
        assert is_reset(one)
        assert ask(two, b"9") == b"9"


def test_a_reply_is_lost_though_the_request_arrives(proxy: Proxy, echo: Echo) -> None:
    with dial(proxy) as client, dial(proxy) as other:
        proxy.lose_reply(b"FETCH")
        assert ask(client, b"PING") == b"PING"
        client.sendall(b"a FETCH b")
        assert is_reset(client)
        echo.wait_for(b"PINGa FETCH b", b"")
        assert ask(other, b"FETCH") == b"FETCH"


def test_some_data_is_broken_by_chance(echo: Echo) -> None:
    with Proxy(echo.address, seed=1) as proxy:
        proxy.sometimes(up=0.5)
        whole = 0
        for _ in range(20):
            with dial(proxy) as client:
                client.sendall(b"x" * 10)
                with contextlib.suppress(ConnectionResetError):
                    whole += receive(client, 10) == b"x" * 10
        assert 0 < whole < 20
        assert proxy.broken == 20 - whole
        assert any(len(got) < 10 for got in echo.got)


def test_a_black_hole_swallows_both_ways_and_healing_resets(proxy: Proxy, echo: Echo) -> None:
    with dial(proxy) as old:
        assert ask(old, b"x") == b"x"
        proxy.black_hole()
        old.sendall(b"lost")
        assert hears_nothing(old)
        with dial(proxy) as new:
            new.sendall(b"lost too")
            assert hears_nothing(new)
            proxy.heal()
            assert is_reset(new)
        assert is_reset(old)
        echo.wait_for(b"x")
    with dial(proxy) as client:
        assert ask(client, b"y") == b"y"


def test_half_open_loses_answers_only(proxy: Proxy, echo: Echo) -> None:
    with dial(proxy) as client:
        proxy.half_open()
        client.sendall(b"heard")
        echo.wait_for(b"heard")
        assert hears_nothing(client)
        proxy.heal()
        assert is_reset(client)


def test_a_connection_that_lost_nothing_survives_healing(proxy: Proxy) -> None:
    with dial(proxy) as client:
        assert ask(client, b"x") == b"x"
        proxy.black_hole()
        proxy.heal()
        assert ask(client, b"y") == b"y"


def test_what_is_held_arrives_late_and_whole(proxy: Proxy, echo: Echo) -> None:
    with dial(proxy) as client:
        assert ask(client, b"x") == b"x"
        proxy.hold()
        client.sendall(b"late")
        assert hears_nothing(client)
        echo.wait_for(b"x")
        proxy.heal()
        assert receive(client, 4) == b"late"


def test_the_target_may_move(proxy: Proxy, echo: Echo) -> None:
    other = Echo()
    try:
        with dial(proxy) as old:
            assert ask(old, b"x") == b"x"
            proxy.target = other.address
            with dial(proxy) as new:
                assert ask(new, b"yy") == b"yy"
            assert ask(old, b"x") == b"x"
        echo.wait_for(b"xx")
        other.wait_for(b"yy")
    finally:
        other.close()


def test_without_a_server_connections_end(proxy: Proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        host, port = gone.getsockname()
    proxy.target = host, port
    assert is_refused(proxy)
    assert proxy.refused == 1
