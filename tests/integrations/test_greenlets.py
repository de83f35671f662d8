"""Senders that gevent or eventlet has patched, and a worker that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.integrations.programs import LONG, Programs, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PREFIX = f"green{os.getpid()}"  # the server of RabbitMQ is shared
PATCHES = {
    "gevent": ("import gevent as green", "from gevent import monkey; monkey.patch_all()"),
    "eventlet": ("import eventlet as green", "green.monkey_patch()"),
}


def send(programs: Programs, library: str, code: str, url: str, *, late: bool = False) -> str:
    """Run a program that a library has patched before or after it loads aiotaskq."""
    load, patch = PATCHES[library]
    first = [load, patch]
    if late:
        first = [load, "from tasks import app, add, nap", "add.delay(0, 0)", patch]
    text = "\n".join([*first, "from tasks import app, add, nap", textwrap.dedent(code)])
    programs.write("sender.py", text)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "sender.py"],
        cwd=programs.folder,
        env=environment(AIOTASKQ_BROKER_URL=url, AIOTASKQ_PREFIX=PREFIX),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("library", list(PATCHES))
@pytest.mark.parametrize(
    ("broker", "late"), [("sqlite", True), pytest.param("redis", False, marks=pytest.mark.server)]
)
def test_greenlets_send_and_wait_and_let_the_others_run(
    programs: Programs, request: pytest.FixtureRequest, broker: str, late: bool, library: str
) -> None:
    url = "sqlite:///q.db"
    if broker == "redis":
        url = request.getfixturevalue("redis_url").replace("127.0.0.1", "localhost")
    worker = programs.worker("tasks:app", AIOTASKQ_BROKER_URL=url, AIOTASKQ_PREFIX=PREFIX)
    code = """
        ticks, results = [], []

        def tick():
            while True:
                ticks.append(1)
                green.sleep(0.01)

        def ask(number):
            for _ in range(3):
                assert add.delay(number, 1).get(timeout=30) == number + 1
            results.append(number)

        green.spawn(tick)
        add.delay(0, 0)
        assert add.delay(0, 0).get(timeout=30) == 0
        before = len(ticks)
        assert nap.delay(0.3, "x").get(timeout=30) == "x"
        assert len(ticks) - before >= 3, len(ticks) - before
        for number in range(5):
            green.spawn(ask, number)
        while len(results) < 5:
            green.sleep(0.01)
        try:
            nap.delay(3600).get(timeout=0.05)
        except TimeoutError:
            print("late")
        try:
            with green.Timeout(0.05):
                nap.delay(3600).get()
        except green.Timeout:
            print("given up")
        assert add.delay(1, 1).get(timeout=30) == 2
        print(sorted(results), flush=True)
    """
    printed = send(programs, library, code, url, late=late)
    assert printed == "late\ngiven up\n[0, 1, 2, 3, 4]\n"
    worker.signal(signal.SIGINT)
    worker.line("Again to stop at once")  # two signals at once may be one
    worker.signal(signal.SIGINT)
    worker.wait()


@pytest.mark.parametrize("library", list(PATCHES))
def test_a_patched_program_that_forks_can_send_in_both(programs: Programs, library: str) -> None:
    code = """
        import os
        app.send_task("parent")
        child = os.fork()
        if child == 0:
            app.send_task("child")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        app.send_task("parent")
        print(status)
    """
    assert send(programs, library, code, "sqlite:///q.db") == "0\n"
    more = {"AIOTASKQ_BROKER_URL": "sqlite:///q.db", "AIOTASKQ_PREFIX": PREFIX}
    shown = programs.run("queues", "tasks:app", **more).stdout
    assert " 3 " in shown


@pytest.mark.parametrize("library", list(PATCHES))
def test_the_default_timeout_of_sockets_does_not_end_a_wait(
    programs: Programs, library: str
) -> None:
    code = """
        import socket
        socket.setdefaulttimeout(1e-6)
        app.send_task("x")
        print("sent")
    """
    assert send(programs, library, code, "sqlite:///q.db") == "sent\n"


@pytest.mark.server
def test_nothing_starts_a_thread_while_the_interpreter_ends(
    programs: Programs, redis_url: str
) -> None:
    code = """
        import atexit, threading
        from tasks import add

        def refuse(*arguments):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        add.delay(1, 2)
        atexit.register(setattr, threading.Thread, "start", refuse)
    """
    programs.write("sender.py", textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "sender.py"],
        cwd=programs.folder,
        env=environment(AIOTASKQ_BROKER_URL=redis_url.replace("127.0.0.1", "localhost")),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.server
@pytest.mark.parametrize("broker", ["postgres", "rabbitmq"])
def test_greenlets_send_to_every_server(
    programs: Programs, request: pytest.FixtureRequest, broker: str
) -> None:
    url = (
        request.getfixturevalue("postgres_url")
        if broker == "postgres"
        else request.getfixturevalue("rabbit_server").url()
    ).replace("127.0.0.1", "localhost")
    code = """
        def send():
            for _ in range(3):
                add.delay(1, 2)

        green.joinall([green.spawn(send) for _ in range(3)])
        print("sent")
    """
    assert send(programs, "gevent", code, url) == "sent\n"
