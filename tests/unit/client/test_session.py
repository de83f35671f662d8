"""The session of an event loop: opening drivers, and closing them at its end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aiotaskq.client.session import Session
from aiotaskq.errors import BackendUnavailable, BrokerUnavailable, ConfigError
from tests.unit.client.drivers import (
    RecordingBackend,
    RecordingBroker,
    envelope,
    outcome,
    until,
)

ROOT = Path(__file__).parents[3]


async def test_sending_opens_no_result_backend() -> None:
    broker, backend = RecordingBroker(), RecordingBackend()
    session = Session(broker, backend, publish_timeout=5)
    await session.open()
    await session.publisher.publish([envelope("1")])
    assert (broker.opened, backend.opened) == (1, 0)
    await session.close()
    assert broker.closed == 1


async def test_each_driver_is_opened_once_however_many_ask() -> None:
    broker, backend = RecordingBroker(), RecordingBackend()
    session = Session(broker, backend, publish_timeout=5)
    await asyncio.gather(*[session.open() for _ in range(9)], *[session.results() for _ in "abc"])
    assert (broker.opened, backend.opened) == (1, 1)
    await session.close()
    assert (broker.closed, backend.closed) == (1, 1)


async def test_an_unused_session_can_be_closed() -> None:
    broker = RecordingBroker()
    session = Session(broker, None, publish_timeout=5)
    await session.open()
    await session.close()
    await session.close()
    assert broker.closed == 1


async def test_an_open_that_failed_is_tried_again() -> None:
    class Away(RecordingBroker):
        async def open(self) -> None:
            await super().open()
            if self.opened == 1:
                raise BrokerUnavailable("away")

    broker = Away()
    session = Session(broker, None, publish_timeout=0)
    with pytest.raises(BrokerUnavailable):
        await session.open()
    await session.open()
    assert broker.opened == 2
    await session.close()


async def test_opening_is_as_patient_as_sending() -> None:
    class Away(RecordingBroker):
        async def open(self) -> None:
            await super().open()
            if self.opened < 3:
                raise BrokerUnavailable("away")

    broker = Away()
    session = Session(broker, None, publish_timeout=60)
    await session.open()
    assert broker.opened == 3
    await session.close()


async def test_waiting_outlasts_an_outage_before_the_first_connection() -> None:
    class Away(RecordingBackend):
        back = False

        async def open(self) -> None:
            await super().open()
            if not self.back:
                raise BackendUnavailable("away")

    broker, backend = RecordingBroker(), Away()
    session = Session(broker, backend, publish_timeout=0)
    waiting = asyncio.create_task(session.wait("1"))
    await until(lambda: backend.opened >= 2)
    with pytest.raises(BackendUnavailable):  # a look is not to wait for so long
        await session.results()
    await session.open()  # nor does a sender wait for the results
    backend.back = True
    await backend.store([outcome("1")], None)
    assert (await waiting).task_id == "1"
    await session.close()


async def test_without_a_backend_waiting_is_a_config_error() -> None:
    session = Session(RecordingBroker(), None, publish_timeout=5)
    with pytest.raises(ConfigError, match="keeps no results"):
        await session.wait("1")
    assert not session.keeps_results


def test_the_end_of_the_loop_closes_it_after_all_tasks() -> None:
    broker, backend = RecordingBroker(), RecordingBackend()
    closed_before_the_last_send: list[int] = []

    async def main() -> None:
        session = Session(broker, backend, publish_timeout=5)
        await session.open()

        async def linger() -> None:
            try:
                await session.wait("never")
            finally:
                closed_before_the_last_send.append(broker.closed)
                await session.publisher.publish([envelope("last")])

        kept.append(asyncio.create_task(linger()))
        await until(lambda: backend.loads)

    kept: list[asyncio.Task[None]] = []
    asyncio.run(main())
    assert closed_before_the_last_send == [0]
    assert (broker.closed, backend.closed) == (1, 1)
    assert broker.calls[-1][0] == ["last"]


@pytest.mark.parametrize("url", ["memory://", "sqlite:///q.db"])
@pytest.mark.parametrize(
    "ending",
    [
        "asyncio.run(main())",
        "asyncio.run(main()); asyncio.run(main())",
        "uvloop.run(main())",
    ],
)
def test_a_program_without_async_with_says_nothing(tmp_path: Path, url: str, ending: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import asyncio, gc
            import uvloop
            from aiotaskq import ResultTimeout, TaskQueue
            app = TaskQueue("t", broker="{url}")

            @app.task
            async def add(x: int, y: int) -> int:
                return x + y

            async def main():
                handle = await add.kiq(2, 8)
                try:
                    await handle.result(timeout=0.05)
                except ResultTimeout:
                    print("waited")
                forgotten.append(asyncio.ensure_future(handle.result()))
                await asyncio.sleep(0.05)

            forgotten = []
            {ending}
            del forgotten
            gc.collect()
            """
        )
    )
    assert run(program) == "waited\n" * ending.count("run(")


def test_a_loop_that_is_closed_by_hand_says_nothing_after_a_send(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import asyncio, gc
            from aiotaskq import TaskQueue
            app = TaskQueue("t", broker="memory://")
            for _ in range(3):
                loop = asyncio.new_event_loop()
                loop.run_until_complete(app.send("x"))
                loop.close()
                del loop
                gc.collect()
            """
        )
    )
    assert run(program) == ""


def test_a_plain_program_whose_file_is_gone_at_its_end_says_nothing(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import shutil
            from aiotaskq import ResultTimeout, TaskQueue
            app = TaskQueue("t", broker="sqlite:///there/queue.db")

            @app.task
            def add(x: int, y: int) -> int:
                return x + y

            import os
            os.mkdir("there")
            try:
                add.delay(2, 8).get(timeout=0.05)
            except ResultTimeout:
                print("waited")
            shutil.rmtree("there")
            """
        )
    )
    assert run(program) == "waited\n"
    assert not (tmp_path / "there").exists()


def run(program: Path) -> str:
    """Run a program in which every warning is an error; return its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", str(program)],
        cwd=program.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    # The debug mode of asyncio reports callbacks that take long, as they do on a busy machine.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert said == []
    assert done.returncode == 0
    return done.stdout
