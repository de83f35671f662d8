"""Messages over pipes whose other end may be dead or stopped."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from aiotaskq.contract.records import Grant
from aiotaskq.processes.pipe import (
    EventLoopTick,
    LeaseBegun,
    LeaseEnded,
    SupervisorPipe,
    WorkerProcessReady,
    has_room,
    receive,
    send,
    supervisor_messages,
)

GRANT = Grant("c1", ("default",), 15.0)


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    """Both ends of a pipe: to read from, and to write to."""
    reader, writer = Pipe(duplex=False)
    yield reader, writer
    reader.close()
    writer.close()


def test_messages_come_in_their_order_and_are_all_read_after_the_death_of_the_writer(
    ends: tuple[Connection, Connection],
) -> None:
    reader, writer = ends
    supervisor = SupervisorPipe(writer)
    supervisor.ready(WorkerProcessReady(processes=2, patience=30.0))
    supervisor.tick(more=True)
    assert list(receive(reader, supervisor_messages)) == [
        WorkerProcessReady(2, 30.0, None),
        EventLoopTick(more=True),
    ]
    supervisor.lease_begun(GRANT, url="redis://localhost", prefix="aiotaskq", beat=5.0)
    supervisor.lease_ended(GRANT)
    writer.close()
    messages = receive(reader, supervisor_messages)
    begun = next(messages)
    assert isinstance(begun, LeaseBegun)
    assert (begun.grant, begun.url, begun.prefix, begun.beat) == (
        GRANT,
        "redis://localhost",
        "aiotaskq",
        5.0,
    )
    assert next(messages) == LeaseEnded("c1")
    with pytest.raises(EOFError):
        next(messages)


def test_what_is_sent_to_a_dead_reader_is_lost_without_an_error(
    ends: tuple[Connection, Connection],
) -> None:
    reader, writer = ends
    reader.close()
    SupervisorPipe(writer).lease_ended(GRANT)


def test_a_tick_is_left_out_where_nobody_reads(ends: tuple[Connection, Connection]) -> None:
    reader, writer = ends
    sent = 0
    while has_room(writer):
        send(writer, EventLoopTick(more=True))
        sent += 1
    SupervisorPipe(writer).tick(more=True)  # would wait for ever otherwise
    assert len(list(receive(reader, supervisor_messages))) == sent
