"""Processes that are killed at any instant lose nothing, and stop nobody."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from busy import LEASE
from folder_harness import FolderHarness

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import Maintained
from aiotaskq.contract.settlement import Done
from aiotaskq.errors import BrokerUnavailable

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""
FORK = """
import asyncio, os, signal, sys, time
from aiotaskq_folder import FolderBroker

def work():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    await FolderBroker(sys.argv[1]).folder.run(work)  # under the lock

asyncio.run(main())
"""
HERE = Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": str(HERE.parent)}


def test_one_that_is_killed_at_any_step_leaves_all_or_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "crash_points.py"), str(tmp_path)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    points = dict(line.split() for line in done.stdout.splitlines())
    assert int(points["settle"]) > 10


async def test_many_that_are_killed_at_random_lose_nothing(tmp_path: Path) -> None:
    harness = FolderHarness(tmp_path)
    broker = await harness.broker()
    chance, logs = random.Random(1), tmp_path / "logs"
    logs.mkdir()

    def start() -> subprocess.Popen[bytes]:
        log = str(logs / str(time.monotonic_ns()))
        return subprocess.Popen([sys.executable, str(HERE / "busy.py"), broker.url, log], env=ENV)

    processes = [start() for _ in range(4)]
    try:
        for _ in range(12):
            await asyncio.sleep(chance.uniform(0.2, 0.8))
            victim = chance.randrange(len(processes))
            assert processes[victim].poll() is None, "one ended by itself"
            processes[victim].kill()
            processes[victim].wait()
            processes[victim] = start()
        while len(read(logs)[0]) <= 100:  # on a busy machine they are slow
            await asyncio.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    await harness.pass_time(LEASE + 1.0)
    while await broker.maintain() != Maintained():
        pass
    rest = await drained(harness)
    sent, ended = read(logs)
    assert set(sent) <= ended | set(rest), "lost"
    assert max(Counter(rest).values(), default=1) == 1, "there twice"
    assert await broker.depth() == {}
    assert {name.split("/")[0] for name in await harness.leaks()} <= {"new", "wake"}
    await harness.close()


async def drained(harness: FolderHarness) -> list[str]:
    """Return the ids of the messages that are left, and settle them."""
    broker = await harness.broker()
    consumer = broker.consumer(["q"], name="last", lease=60.0)
    await consumer.open()
    ids: list[str] = []
    while got := await consumer.fetch(100, 0.5):
        ids += [one.id for one in got]
        assert not await consumer.settle([Done(one) for one in got])
    await consumer.close()
    return ids


def read(logs: Path) -> tuple[list[str], set[str]]:
    """Return the stored ids and the ids that were about to be settled."""
    lines = [line.split() for log in logs.iterdir() for line in log.read_text().splitlines()]
    whole = [line for line in lines if len(line) == 2]
    return [one for sign, one in whole if sign == "+"], {one for sign, one in whole if sign == "-"}


async def test_one_that_stands_still_with_the_lock_stops_nobody_for_ever(tmp_path: Path) -> None:
    harness = FolderHarness(tmp_path)
    broker = await harness.broker()
    assert await broker.depth() == {}
    lock = str(harness.path / "aiotaskq/lock")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        await asyncio.to_thread(holder.stdout.readline)
        with pytest.raises(BrokerUnavailable, match="another process holds the lock"):
            await broker.depth()
    finally:
        holder.kill()
        holder.communicate()
    assert await broker.depth() == {}
    await harness.close()


async def test_a_child_of_one_that_was_killed_does_not_keep_its_lock(tmp_path: Path) -> None:
    harness = FolderHarness(tmp_path)
    broker = await harness.broker()
    parent = subprocess.Popen(
        [sys.executable, "-c", FORK, broker.url], env=ENV, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert parent.wait() == -signal.SIGKILL
        assert await broker.depth() == {}
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()
    await harness.close()


async def test_files_that_cannot_be_read_and_strange_ones_stop_nobody(tmp_path: Path) -> None:
    harness = FolderHarness(tmp_path)
    broker = await harness.broker()
    await broker.publish([Envelope(id=one, queue="q", body=b"") for one in "abcd"])
    consumer = broker.consumer(["q"], name="dies", lease=LEASE)
    await consumer.open()
    assert len(await consumer.fetch(2, 0)) == 2
    root = harness.path / "aiotaskq"
    waiting, held = root / "waiting/q.queue", root / "held" / consumer.id
    for folder in (waiting, held):
        # As a power failure may leave a file without fsync, and another program its own.
        next(folder.iterdir()).write_bytes(b"")
        (folder / ".DS_Store").write_bytes(b"")
        (folder / "notes.txt").write_bytes(b"")
    (root / "journal").write_bytes(b"[")
    await harness.pass_time(LEASE + 1.0)
    assert await broker.maintain() == Maintained(reclaimed=1)
    assert len(await drained(harness)) == 2
    assert len(list((root / "broken").iterdir())) == 3
    await consumer.close()
    await harness.close()
