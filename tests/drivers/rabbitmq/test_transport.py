"""Connections to RabbitMQ: the handshake, channels, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from urllib.parse import quote

import pytest
import uvloop
from pamqp.commands import Basic, Queue

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.rabbitmq.channel import (
    AmqpDisconnected,
    AmqpMessage,
    AmqpNoAnswer,
    AmqpPublication,
    AmqpRefused,
)
from aiotaskq.drivers.rabbitmq.transport import RabbitTransport, connect
from aiotaskq.drivers.rabbitmq.url import parse_url
from aiotaskq.errors import BrokerUnavailable, ConfigError
from tests.servers import Certificates, RabbitServer

PATIENCE = 120.0
ODD = "ü:@/%41 +&?#\\"


@pytest.fixture
def server(rabbit_server: RabbitServer) -> RabbitServer:
    rabbit_server.start()
    return rabbit_server


@pytest.fixture
async def transport(server: RabbitServer) -> AsyncIterator[RabbitTransport]:
    transport = await connect(parse_url(server.url()))
    yield transport
    await transport.close()


def erlang(text: str) -> str:
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"


@pytest.fixture
def odd(server: RabbitServer) -> Iterator[str]:
    """A URL with a user, a password and a virtual host of odd names."""
    name, by = erlang(ODD), erlang("a test")
    every = erlang(".*")
    server.evaluate(f"rabbit_vhost:add({name}, {by})")
    server.evaluate(f"rabbit_auth_backend_internal:add_user({name}, {name}, {by})")
    server.evaluate(
        f"rabbit_auth_backend_internal:set_permissions({name}, {name}, {every}, {every}, {every},"
        f" {by})"
    )
    text = quote(ODD, safe="")
    yield server.url(user=text, password=text, query=text)
    server.evaluate(f"rabbit_auth_backend_internal:delete_user({name}, {by})")
    server.evaluate(f"rabbit_vhost:delete({name}, {by})")


async def test_users_passwords_and_virtual_hosts_may_have_odd_names(odd: str) -> None:
    transport = await connect(parse_url(odd))
    await (await transport.open_channel()).call(Queue.Declare(exclusive=True))
    await transport.close()


async def test_a_missing_virtual_host_is_a_configuration_error(
    server: RabbitServer,
) -> None:
    broker = RabbitBroker(server.url(query="nowhere"))
    with pytest.raises(ConfigError, match="vhost nowhere not found"):
        await broker.open()


async def test_a_client_certificate_authenticates_where_there_is_no_user(
    server: RabbitServer, certificates: Certificates
) -> None:
    ours = f"cafile={certificates.authority}&certfile={certificates.certificate}"
    url = server.tls_url(f"?{ours}&keyfile={certificates.key}").replace("guest:guest@", "")
    # This server is not configured to accept it.
    with pytest.raises(ConfigError, match=r"does not know the mechanism EXTERNAL: .*PLAIN"):
        await RabbitBroker(url).open()


# --- servers that are none ----------------------------------------------------------------------


@asynccontextmanager
async def imposter(says: bytes) -> AsyncIterator[str]:
    """A server that sends the same bytes to every client."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await reader.read(-1)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"amqp://user:s3cret@127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (b"AMQP\x00\x01\x00\x00", "another version of AMQP"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no answer to the greeting in time"),
        (b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x77\xce", "amqp://"),  # no method of AMQP
        (b"", "no answer to the greeting in time"),
    ],
)
async def test_a_server_that_does_not_speak_amqp_is_given_up(says: bytes, told: str) -> None:
    async with imposter(says) as url:
        with pytest.raises(BrokerUnavailable, match=told) as caught:
            await RabbitBroker(f"{url}?connect_timeout=0.3").open()
    assert "s3cret" not in str(caught.value)


async def test_connecting_can_be_cancelled() -> None:
    async with imposter(b"") as url:
        connecting = asyncio.create_task(connect(parse_url(url)))
        await asyncio.sleep(0.05)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting


# --- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 131_064, 131_065, 1_000_000])
async def test_a_message_is_cut_into_frames_and_put_together(
    transport: RabbitTransport, size: int
) -> None:
    channel = await transport.open_channel(confirms=True)
    [queue] = await channel.call(Queue.Declare(exclusive=True))
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    properties = Basic.Properties(message_id="m", headers={"n": 1}).marshal()
    confirmation = channel.publish([AmqpPublication("", queue.queue, properties, body)] * 2)
    await confirmation.done
    for found in await channel.call(Basic.Get(queue=queue.queue), Basic.Get(queue=queue.queue)):
        assert isinstance(found, AmqpMessage)
        assert found.body == body
        assert (found.properties.message_id, found.properties.headers) == ("m", {"n": 1})


async def test_many_batches_can_be_published_without_waiting(transport: RabbitTransport) -> None:
    channel = await transport.open_channel(confirms=True)
    [queue] = await channel.call(Queue.Declare(exclusive=True))
    one = AmqpPublication("", queue.queue, Basic.Properties().marshal(), b"x")
    for confirmation in [channel.publish([one]) for _ in range(500)]:
        await confirmation.done
    [found] = await channel.call(Queue.Declare(queue=queue.queue, passive=True))
    assert found.message_count == 500


async def test_a_refusal_costs_the_channel_and_not_the_connection(
    transport: RabbitTransport,
) -> None:
    channel, other = await transport.open_channel(), await transport.open_channel()
    with pytest.raises(AmqpRefused) as caught:
        await channel.call(Queue.Declare(queue="nothing", passive=True))
    assert caught.value.code == 404
    await channel.close()
    await other.call(Basic.Qos(prefetch_count=1))
    assert transport.error is None


async def test_channels_come_and_go(transport: RabbitTransport) -> None:
    for _ in range(3000):  # the server allows 2047 at once
        await (await transport.open_channel()).close()


async def test_a_channel_whose_opening_was_cancelled_is_closed(transport: RabbitTransport) -> None:
    taken = transport._connection.channels
    before = len(taken)
    for turns in range(40):
        opening = asyncio.create_task(transport.open_channel(confirms=True))
        for _ in range(turns % 20):
            await asyncio.sleep(0)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await opening).close()
    await (await transport.open_channel()).close()  # which is answered last
    async with asyncio.timeout(PATIENCE):
        while len(taken) > before:
            await asyncio.sleep(0.01)
    assert transport.error is None


async def test_concurrent_first_publications_share_a_channel(server: RabbitServer) -> None:
    broker = RabbitBroker(server.url(), prefix="at once")
    await broker.open()
    await broker.publish([Envelope(id="a", queue="q", body=b"x")])
    connection = broker._connection.get()
    publisher = connection._publisher
    assert publisher is not None
    await publisher.close()
    taken = (await connection.transport())._connection.channels
    before = len(taken)
    await asyncio.gather(
        *(broker.publish([Envelope(id=str(number), queue="q", body=b"x")]) for number in range(100))
    )
    assert len(taken) == before + 1
    await broker.close()


async def test_frames_sent_before_close_reach_the_server(
    server: RabbitServer, transport: RabbitTransport
) -> None:
    last = await connect(parse_url(server.url()))
    channel = await last.open_channel()
    [queue] = await channel.call(Queue.Declare(queue="last words", durable=True))
    there = await transport.open_channel()
    channel.send_unanswered(channel.pack(Queue.Delete(queue=queue.queue, nowait=True)))
    await last.close()
    with pytest.raises(AmqpRefused) as caught:
        await there.call(Queue.Declare(queue=queue.queue, passive=True))
    assert caught.value.code == 404


# --- the end ------------------------------------------------------------------------------------


async def test_waiting_calls_get_the_reason_when_the_server_closes_the_connection(
    server: RabbitServer, transport: RabbitTransport, caplog: pytest.LogCaptureFixture
) -> None:
    channel = await transport.open_channel()
    [queue] = await channel.call(Queue.Declare(exclusive=True))
    listening = channel.start(channel.pack(Basic.Get(queue=queue.queue)) * 2000)
    await asyncio.to_thread(server.close_connections)
    async with asyncio.timeout(PATIENCE):
        await transport.closed
    assert isinstance(transport.error, AmqpRefused)
    assert transport.error.code == 320
    assert "by a test" in str(transport.error)
    assert all(one.done() for one in listening)
    with pytest.raises(AmqpDisconnected):
        await transport.open_channel()
    with pytest.raises(AmqpRefused):
        await channel.call(Basic.Qos())
    # Logging it is left to the users of the connection.
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


async def test_a_server_that_stands_still_does_not_delay_closing(
    server: RabbitServer, transport: RabbitTransport
) -> None:
    channel = await transport.open_channel()
    server.pause()
    try:
        asking = asyncio.create_task(channel.call(Basic.Qos()))
        # More than all buffers on the way hold.
        transport.write(b"x" * 50_000_000)
        await asyncio.sleep(0.05)
        async with asyncio.timeout(PATIENCE):
            await transport.close()
        with pytest.raises(AmqpDisconnected):
            await asking
    finally:
        server.resume()


@pytest.mark.slow
async def test_a_server_without_a_sign_of_life_is_given_up(server: RabbitServer) -> None:
    transport = await connect(parse_url(server.url(query="?heartbeat=1")))
    await asyncio.sleep(3.0)
    assert transport.error is None  # heartbeats arrive while nothing else does
    server.pause()
    try:
        async with asyncio.timeout(PATIENCE):
            await transport.closed
        assert isinstance(transport.error, AmqpNoAnswer)
    finally:
        server.resume()
    await transport.close()


@pytest.mark.parametrize("loops", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_event_loop_may_end_before_the_transport_is_closed(
    server: RabbitServer,
    loops: Callable[[], asyncio.AbstractEventLoop],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with asyncio.Runner(loop_factory=loops) as runner:
        transport = runner.run(connect(parse_url(server.url())))
    assert isinstance(transport.error, AmqpDisconnected)
    del transport
    gc.collect()  # asyncio logs tasks that were left behind then
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


async def test_a_consumer_whose_opening_was_cancelled_leaves_nothing_in_its_thread(
    server: RabbitServer, caplog: pytest.LogCaptureFixture
) -> None:
    broker = RabbitBroker(server.url(), prefix="unopened")
    await broker.open()
    for number in range(30):
        consumer = broker.consumer(["q"], name="w", lease=60.0)
        opening = asyncio.create_task(consumer.open())
        await asyncio.sleep(number * 0.001)  # somewhere in the middle
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await consumer.close()
    await broker.close()
    gc.collect()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
