"""Leases that the lease keeper renews and ends: real worker processes, real deaths.

Where a lease is to make no difference it is much longer than any test waits.
"""

from __future__ import annotations

import os
import re
import signal

import msgspec
import pytest

from aiotaskq.contract.records import DeathDetails
from tests.integrations.programs import Programs, gone, wait_for
from tests.integrations.sites import Site
from tests.servers import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


# --- deaths ---------------------------------------------------------------------------------------


def test_a_sibling_gets_what_a_killed_process_held_at_once(site: Site) -> None:
    worker = site.worker(2)
    task_id = site.call("tasks.nap", "3", "x")
    victim = int(worker.line(r"napping x (\d+)").group(1))
    os.kill(victim, signal.SIGKILL)
    taker = int(worker.line(r"napping x (\d+) 1$", times=2).group(1))  # the same attempt
    assert taker != victim
    note = rf"worker-\d \(pid {victim} on \S+\) was killed by signal 9 \(Killed\), \d+ MiB in use"
    # The sibling may have looked before the lease keeper had ended the lease.
    worker.line(f"gave 1 task back: {note}|took 1 task back from workers that died")
    assert site.result(task_id) == '"x"'
    assert worker.stop() == 0


def test_the_replacement_of_the_only_process_gets_it_at_once(local: Site) -> None:
    worker = local.worker(1)
    [victim] = worker.worker_pids(1)
    task_id = local.call("tasks.nap", "1", "x")
    worker.line("napping x")
    os.kill(victim, signal.SIGKILL)
    worker.line(rf"process {victim} was killed .* starting another in 0\.1 s")
    worker.line("napping x", times=2)
    assert local.result(task_id) == '"x"'
    assert worker.stop() == 0


def test_how_workers_died_is_kept_with_the_task_that_killed_them(site: Site) -> None:
    worker = site.worker(1, max_crashes=2)
    task_id = site.call("tasks.die", str(int(signal.SIGSEGV)))
    worker.line("goes to the dead letters")
    assert "WorkerLost" in site.result(task_id)
    [letter] = site.dead()
    assert letter.crashes == 2
    note = r"worker-1 \(pid \d+ on \S+\) was killed by signal 11 \(Segmentation fault\)"
    assert re.search(note, letter.reason)
    assert re.match(note, msgspec.json.decode(letter.details, type=DeathDetails).crash_note)
    assert worker.stop() == 0


def test_a_process_that_dies_while_all_stop_hands_over_as_well(site: Site) -> None:
    worker = site.worker(2)
    task_id = site.call("tasks.nap", "3", "x")
    victim = int(worker.line(r"napping x (\d+)").group(1))
    worker.signal(signal.SIGTERM)
    worker.line("stopping: what runs gets")
    os.kill(victim, signal.SIGKILL)
    assert worker.wait() == 0
    other = site.worker(1)
    other.line("napping x")
    assert site.result(task_id) == '"x"'
    assert other.stop() == 0


@pytest.mark.server
def test_a_death_while_the_broker_is_away_is_told_when_it_is_back(
    redis_url: str, redis_server: RedisServer, programs: Programs
) -> None:
    site = Site(programs, redis_url)
    worker = site.worker(2)
    task_id = site.call("tasks.nap", "3", "x")
    victim = int(worker.line(r"napping x (\d+)").group(1))
    redis_server.stop()
    try:
        os.kill(victim, signal.SIGKILL)
        worker.line(f"process {victim} was killed")
    finally:
        redis_server.start()
    worker.line("napping x", times=2)
    assert site.result(task_id) == '"x"'
    assert worker.stop() == 0


# --- life -----------------------------------------------------------------------------------------


def test_a_process_that_c_code_holds_for_longer_than_its_lease_keeps_its_task(site: Site) -> None:
    worker = site.worker(2, lease=6, worker_loop_block_warning=None)
    task_id = site.call("tasks.hold", "13")
    holder = worker.line(r"holding (\d+)").group(1)
    worker.line("^held$")
    assert site.result(task_id) == holder
    assert len(re.findall("^holding", worker.output, re.MULTILINE)) == 1
    assert "under a new lease" not in worker.output
    assert worker.stop() == 0


def test_a_process_that_is_stopped_is_given_up_after_its_lease(site: Site) -> None:
    worker = site.worker(2, lease=2.0)
    task_id = site.call("tasks.nap", "3", "x")
    frozen = int(worker.line(r"napping x (\d+)").group(1))
    os.kill(frozen, signal.SIGSTOP)
    try:
        taker = int(worker.line(r"napping x (\d+)", times=2).group(1))
        assert taker != frozen
        assert site.result(task_id) == '"x"'
    finally:
        os.kill(frozen, signal.SIGCONT)
    worker.line("going on under a new lease")
    # The new lease is kept as well.
    here = worker.here
    site.call("tasks.nap", "2", "y")
    worker.line("napping y", after=here)
    assert worker.stop() == 0


# --- the lease keeper itself ----------------------------------------------------------------------


def test_a_lease_keeper_that_died_is_replaced_and_knows_everything(site: Site) -> None:
    worker = site.worker(2)
    first = worker.lease_keeper_pid()
    os.kill(first, signal.SIGKILL)
    worker.line("the process that keeps the leases ended; starting another")
    wait_for(
        lambda: any(each.pid != first for each in worker.lease_keepers()), "a new lease keeper"
    )
    site.call("tasks.nap", "3", "x")
    victim = int(worker.line(r"napping x (\d+)").group(1))
    os.kill(victim, signal.SIGKILL)
    worker.line("napping x", times=2)
    assert worker.stop() == 0


def test_a_death_that_a_dead_lease_keeper_was_told_of_is_told_to_the_next(local: Site) -> None:
    worker = local.worker(2)
    local.call("tasks.nap", "3", "x")
    victim = int(worker.line(r"napping x (\d+)").group(1))
    keeper = worker.lease_keeper_pid()
    os.kill(keeper, signal.SIGSTOP)  # so that it hears nothing
    os.kill(victim, signal.SIGKILL)
    worker.line(f"process {victim} was killed")
    os.kill(keeper, signal.SIGKILL)
    worker.line("napping x", times=2)
    assert worker.stop() == 0


def test_a_lease_keeper_ignores_the_signals_that_end_a_worker(local: Site) -> None:
    worker = local.worker(1)
    [victim] = worker.worker_pids(1)
    keeper = worker.lease_keeper_pid()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(keeper, number)
    local.call("tasks.nap", "1", "x")
    worker.line("napping x")
    os.kill(victim, signal.SIGKILL)
    worker.line("gave 1 task back")
    assert worker.lease_keeper_pid() == keeper
    worker.line("napping x", times=2)
    assert worker.stop() == 0


def test_a_stopped_lease_keeper_does_not_hold_the_supervisor(local: Site) -> None:
    worker = local.worker(1)
    keeper = worker.lease_keeper_pid()
    os.kill(keeper, signal.SIGSTOP)
    assert worker.stop() == 0
    assert gone(keeper)
