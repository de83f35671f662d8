"""Several processes on one file: races, deaths, forks, identities."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.drivers.sqlite.process_identity import is_alive, is_gone, this_process
from tests.drivers.sqlite.tools import (
    NEVER,
    PATIENCE,
    Start,
    envelope,
    line,
    names,
    opened,
    rows,
    tell,
)


async def test_many_processes_open_a_new_file_at_once(start: Start, path: Path) -> None:
    path.unlink(missing_ok=True)
    lines = """
        await broker.close()
        say("ready")
        at = float(await told())
        time.sleep(max(0.0, at - time.time()))
        await broker.open()
        await broker.publish([envelope("a")])
        say("stored")
        await broker.close()
    """
    # The file that `main` makes is not the one of the race.
    processes = [start(lines) for _ in range(4)]
    assert [await line(one) for one in processes] == ["ready"] * 4
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    at = time.time() + 0.2
    for one in processes:
        assert one.stdin is not None
        one.stdin.write(f"{at}\n")
        one.stdin.flush()
    assert [await line(one) for one in processes] == ["stored"] * 4
    assert rows(path, "SELECT count(*) FROM aiotaskq_messages") == [(4,)]


@pytest.mark.slow
async def test_processes_that_work_at_once_lose_and_double_nothing(
    broker: SQLiteBroker, start: Start, path: Path
) -> None:
    lines = """
        name, chance, taken = await told(), random.Random(), []
        consumer = broker.consumer(["q", "r"], name="test", lease=3600.0)
        await consumer.open()

        async def publish():
            left = [f"{name.strip()}.{n}" for n in range(700)]
            while left:
                size = chance.choice([1, 5, 50])
                queue = chance.choice("qr")
                batch = [envelope(one, queue=queue, priority=len(left) % 3) for one in left[:size]]
                await broker.publish(batch, call_id=f"{left[0]}")
                await broker.publish(batch, call_id=f"{left[0]}")
                left = left[size:]

        async def work():
            while True:
                got = await consumer.fetch(chance.choice([1, 10, 100]), 60.0)
                batch, kept = [], []
                for one in got:
                    how = chance.random()
                    if how < 0.1:
                        batch.append(Release(one))
                    elif how < 0.2:
                        batch.append(Again(one, envelope(one.id)))
                    else:
                        batch.append(Done(one))
                        kept.append(one.id)
                assert not await consumer.settle(batch)
                taken.extend(kept)
                if chance.random() < 0.1:
                    await broker.maintain()

        working = asyncio.create_task(work())
        await publish()
        say("published")
        await told()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        say(*taken)
        await consumer.close()
        await broker.close()
    """
    processes = [start(lines) for _ in range(3)]
    for number, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
    assert [await line(one) for one in processes] == ["published"] * 3
    async with asyncio.timeout(PATIENCE):
        while await broker.depth() != {}:
            await asyncio.sleep(0.05)
    done: list[str] = []
    for process in processes:
        tell(process)
        done += (await line(process)).split()
    assert sorted(done) == sorted(f"{name}.{n}" for name in range(3) for n in range(700))
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.skipif(this_process() is None, reason="this system does not tell processes apart")
@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
async def test_messages_of_a_killed_process_come_back_before_its_lease_ends(
    broker: SQLiteBroker, start: Start, path: Path, reaped: bool
) -> None:
    await broker.publish([envelope(f"{n}") for n in range(100)])
    holder = start(
        """
        consumer = broker.consumer(["q"], name="test", lease=3600.0)
        await consumer.open()
        say(len(await consumer.fetch(100, 0)))
        await asyncio.sleep(3600)
        """
    )
    assert await line(holder) == "100"
    assert (await broker.maintain()).reclaimed == 0
    consumer = await opened(broker)
    waiting = asyncio.create_task(consumer.fetch(100, NEVER))
    holder.kill()
    if reaped:
        holder.wait()
    reclaimed = 0
    async with asyncio.timeout(PATIENCE):
        while not reclaimed:  # a killed process needs a moment to be dead
            reclaimed = (await broker.maintain()).reclaimed
            await asyncio.sleep(0.01)
        got = await waiting
    assert reclaimed == 100
    assert names(got) == [f"{n}" for n in range(100)]
    assert {(one.crashes, one.crash_note) for one in got} == {(1, "test: its process is gone")}
    assert not await consumer.settle([Done(one) for one in got])
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    await consumer.close()


@pytest.mark.slow
async def test_messages_that_a_killed_process_was_told_are_stored_are_there(
    broker: SQLiteBroker, start: Start, path: Path
) -> None:
    accepted: list[str] = []
    for attempt in range(3):
        publisher = start(
            f"""
            for n in range(1_000_000):
                await broker.publish([envelope(f"{attempt}.{{n}}.{{m}}") for m in range(50)])
                say(f"{attempt}.{{n}}")
            """
        )
        told = [await line(publisher) for _ in range(20 * attempt + 5)]
        publisher.kill()
        publisher.wait()
        assert publisher.stdout is not None
        told += publisher.stdout.read().split()  # what it said before it died counts as well
        accepted += [f"{batch}.{m}" for batch in told for m in range(50)]
    stored = [row[0] for row in rows(path, "SELECT id FROM aiotaskq_messages ORDER BY seq")]
    assert len(set(stored)) == len(stored)
    assert set(accepted) <= set(stored)
    assert len(stored) - len(accepted) in range(0, 151, 50)  # whole batches, the last one of each
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


async def test_after_a_fork_the_child_needs_a_clone(start: Start, broker: SQLiteBroker) -> None:
    process = start(
        """
        import warnings
        warnings.simplefilter("ignore")  # later Pythons warn of every fork beside threads
        child = os.fork()
        if child == 0:
            try:
                await broker.publish([envelope("lost")])
            except ConfigError as error:
                say("refused:", "clone()" in str(error))
            await broker.close()
            clone = broker.clone()

            async def use():
                await clone.open()
                await clone.publish([envelope("child")])
                await clone.close()

            import threading  # its own loop: the parent's selector is shared with the parent
            thread = threading.Thread(target=asyncio.run, args=(use(),))
            thread.start()
            thread.join()
            os._exit(0)
        os.waitpid(child, 0)
        await broker.publish([envelope("parent")])
        say("over")
        await broker.close()
        """
    )
    assert await line(process) == "refused: True"
    assert await line(process) == "over"
    consumer = await opened(broker)
    assert names(await consumer.fetch(10, 0)) == ["child", "parent"]
    await consumer.close()


FORKING = """
import logging
import os
import threading

from aiotaskq import TaskQueue

app = TaskQueue("forking", broker="sqlite:///forking.db")
# On a busy machine it lasts long enough to hear that no worker serves the queue.
logging.getLogger("aiotaskq.session").setLevel(logging.ERROR)


@app.task
async def add(x: int, y: int) -> int:
    return x + y


def send(enough: threading.Event) -> None:
    while not enough.is_set():
        add.delay(1, 1)


enough = threading.Event()
threads = [threading.Thread(target=send, args=(enough,)) for _ in range(4)]
for thread in threads:
    thread.start()
children = []
for number in range(10):  # the first ones while the driver is imported, opened, used
    child = os.fork()
    if not child:
        for _ in range(5):
            add.delay(number, 1)
        os._exit(7)
    children.append(child)
print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
enough.set()
for thread in threads:
    thread.join()
print(add.delay(3, 4).status)
"""


def test_a_process_may_fork_while_its_threads_use_the_file(tmp_path: Path) -> None:
    """Neither side waits for a lock of the other's, and both go on."""
    (tmp_path / "forking.py").write_text(FORKING, encoding="utf-8")
    for _ in range(5):
        done = subprocess.run(
            # Python 3.12 and later warn of any fork of a process with threads.
            [sys.executable, "-W", "ignore::DeprecationWarning", "forking.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stdout.split() == ["7"] * 10 + ["PENDING"], done.stderr
        assert not done.stderr


@pytest.mark.skipif(this_process() is None, reason="this system does not tell processes apart")
def test_only_a_process_that_is_certainly_dead_counts_as_gone() -> None:
    ours = this_process()
    assert ours is not None
    where, pid, started = ours.rsplit("/", 2)
    boot, namespace = where.split("/")
    assert pid == str(os.getpid())
    assert is_alive(ours)
    assert not is_gone(ours)
    again = f"{where}/{pid}/{int(started) - 1}"  # the number was used again
    assert is_gone(again)
    assert not is_alive(again)
    container = f"{boot}/{int(namespace) + 1}/{pid}/1"
    machine = f"another-boot/{namespace}/{pid}/1"
    for unknown in (None, container, machine):
        assert not is_gone(unknown)
        assert not is_alive(unknown)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
    try:
        assert not is_gone(f"{where}/{child.pid}/{_started(child.pid)}")
        dead = f"{where}/{child.pid}/{_started(child.pid)}"
    finally:
        child.communicate()
    assert is_gone(dead)
    assert not is_alive(dead)


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
