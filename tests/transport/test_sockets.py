"""Sockets: real ones on the loopback interface."""

from __future__ import annotations

import asyncio
import gc
import select
import weakref
from pathlib import Path
from typing import TypeVar

import pytest
import zmq

from asyncdapo.messages import Ack, Ask, Hello
from asyncdapo.shares import CutWanted
from asyncdapo.transport.codec import Limits, Malformed, encode
from asyncdapo.transport.keys import RunKeys
from asyncdapo.transport.sockets import CLIENT_QUEUE, PEER_QUEUE, Client, Server
from tests.asynchronous import asynchronous, until

T = TypeVar("T")
ESTABLISHED, KEEPALIVE = "01", "02"
"""In /proc/net/tcp."""


@asynchronous
async def test_messages_and_buffers_travel_both_ways() -> None:
    server, client = pair()
    await client.send(Ask(asked=1), [b"tokens", b""])
    peer, message, buffers = await server.receive()
    assert (peer, message, [bytes(buffer) for buffer in buffers]) == (b"worker-0", Ask(asked=1), [b"tokens", b""])
    large = bytes(range(256)) * 4096
    await server.send(peer, Ack(lease_id=7), [large])
    message, [buffer] = await client.receive()
    assert message == Ack(lease_id=7)
    assert buffer == large
    close(server, client)


@asynchronous
async def test_frames_may_be_changed_as_soon_as_they_are_queued() -> None:
    """Many are still in the queue when the first one is read."""
    server, client = pair()
    tokens = bytearray(1 << 20)
    for number in range(1, 33):
        tokens[:] = bytes([number]) * len(tokens)
        await client.send(Ask(asked=number), [tokens])
    for number in range(1, 33):
        peer, message, [buffer] = await server.receive()
        assert message == Ask(asked=number)
        assert buffer == bytes([number]) * len(tokens)
        tokens[:] = buffer
        await server.send(peer, Ack(lease_id=number), [tokens])
    for number in range(1, 33):
        message, [buffer] = await client.receive()
        assert message == Ack(lease_id=number)
        assert buffer == bytes([number]) * len(tokens)
    close(server, client)


def test_a_server_that_was_dropped_while_open_is_collected() -> None:
    """As with a traceback that holds one."""

    async def collected() -> weakref.ref[Server[Hello]]:
        circle = [Server(Hello, curve=RunKeys.make().server)]
        circle.append(circle)
        return weakref.ref(circle[0])

    server = asyncio.run(collected())
    gc.collect()
    assert server() is None


@asynchronous
async def test_bad_input_is_handed_over_as_malformed_and_the_next_message_arrives() -> None:
    server, client = pair()
    await client.send(CutWanted(step=1))
    await client.send(Ask(asked=2))
    peer, message, _ = await server.receive()
    assert peer == b"worker-0"
    assert isinstance(message, Malformed)
    assert server.num_malformed == 1
    assert (await server.receive())[1] == Ask(asked=2)
    close(server, client)


@asynchronous
async def test_the_client_raises_malformed_and_continues() -> None:
    server, client = pair()
    await client.send(Ask(asked=1))
    peer, _, _ = await server.receive()
    await server.send(peer, CutWanted(step=1))
    await server.send(peer, Ack(lease_id=1))
    with pytest.raises(Malformed):
        await client.receive()
    assert (await client.receive())[0] == Ack(lease_id=1)
    close(server, client)


@asynchronous
async def test_a_message_to_a_peer_that_is_gone_is_dropped_and_counted() -> None:
    server, client = pair()
    await client.send(Ask(asked=1))
    peer, _, _ = await server.receive()
    client.close()
    while not server.num_dropped:
        await server.send(peer, Ack(lease_id=1))
        await asyncio.sleep(0.01)
    num_dropped = server.num_dropped
    await server.send(b"never seen", Ack(lease_id=1))
    assert server.num_dropped == num_dropped + 1
    server.close()


@asynchronous
async def test_a_peer_that_does_not_read_costs_a_bounded_queue_and_delays_nobody() -> None:
    server, client = pair()
    deaf = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    deaf.set(zmq.LINGER, 0)
    deaf.set(zmq.RCVHWM, 1)
    deaf.connect(server.address)
    await deaf.send_multipart(encode(Ask(asked=1)))
    peer, *_ = await server.receive()
    num_sent, kilobyte = 0, bytes(1000)
    while server.num_dropped < 100:
        num_dropped = server.num_dropped
        await server.send(peer, Ack(lease_id=num_sent), [kilobyte])
        num_sent += 1
        if server.num_dropped > num_dropped:
            await asyncio.sleep(0.001)  # until TCP's own buffers are full too
    assert num_sent > PEER_QUEUE
    await client.send(Ask(asked=1))
    await server.send((await server.receive())[0], Ack(lease_id=1))
    assert (await client.receive())[0] == Ack(lease_id=1)
    close(server, client, deaf)


@asynchronous
async def test_a_client_waits_without_a_server_and_continues_with_the_next_at_the_same_port() -> None:
    server, client = pair()
    await client.send(Ask(asked=1))
    await server.receive()
    port = int(server.address.rsplit(":", 1)[1])
    disconnected = client._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    server.close()
    await asyncio.to_thread(disconnected.recv_multipart)
    client._socket.disable_monitor()  # first: ZeroMQ's thread would wait for ever to tell a reader that is gone
    disconnected.close()
    await asyncio.sleep(0.2)
    waiting = asyncio.create_task(client.send(Ask(asked=2)))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    server = Server(Ask | Hello, port=port)
    assert (await server.receive())[1] == Ask(asked=2)
    await waiting
    close(server, client)


@asynchronous
async def test_a_slow_server_makes_the_client_wait_and_loses_nothing() -> None:
    server, client = pair()
    num_messages, kilobytes_64 = 4_000, bytes(64 << 10)
    num_sent = 0

    async def send_all() -> None:
        nonlocal num_sent
        for number in range(num_messages):
            await client.send(Ask(asked=number), [kilobytes_64])
            num_sent += 1

    sending = asyncio.create_task(send_all())
    await until(lambda: num_sent > CLIENT_QUEUE)
    num_before = 0
    while num_sent > num_before:
        num_before = num_sent
        await asyncio.sleep(0.2)
    assert num_sent < num_messages
    received = [(await server.receive())[1].asked for _ in range(num_messages)]
    assert received == list(range(num_messages))
    await sending
    close(server, client)


@asynchronous
async def test_a_client_that_waits_for_room_receives_meanwhile_and_then_goes_on() -> None:
    """What receives may take away the signal that there is room, and the other way round."""
    server, client = pair()
    num_messages, kilobytes_64 = 2_000, bytes(64 << 10)

    async def send(numbers: range) -> None:
        for number in numbers:
            await client.send(Ask(asked=number), [kilobytes_64])

    async def answer() -> None:
        for _ in range(num_messages):
            peer, message, _ = await server.receive()
            await server.send(peer, Ack(lease_id=message.asked))

    half = num_messages // 2
    sending = [asyncio.create_task(send(numbers)) for numbers in (range(half), range(half, num_messages))]
    answering = asyncio.create_task(answer())
    received = [(await client.receive())[0].lease_id for _ in range(num_messages)]
    assert [number for number in received if number < half] == list(range(half))
    assert [number for number in received if number >= half] == list(range(half, num_messages))
    await asyncio.gather(answering, *sending)
    close(server, client)


@asynchronous
async def test_a_receive_cancelled_as_its_message_arrives_loses_nothing() -> None:
    server, client = pair()
    await client.send(Ask(asked=0))
    peer, _, _ = await server.receive()
    for number in range(24):
        receiving = asyncio.create_task(server.receive())
        await turns(5)
        await client.send(Ask(asked=number))
        _, message, _ = await cancelled(receiving, number % 6, server._socket) or await server.receive()
        assert message == Ask(asked=number)
        receiving = asyncio.create_task(client.receive())
        await turns(5)
        await server.send(peer, Ack(lease_id=number))
        message, _ = await cancelled(receiving, number % 6, client._socket) or await client.receive()
        assert message == Ack(lease_id=number)
    close(server, client)


async def turns(number: int) -> None:
    """Of the event loop."""
    for _ in range(number):
        await asyncio.sleep(0)


async def cancelled(receiving: asyncio.Task[T], after: int, socket: zmq.Socket) -> T | None:
    """What it received although it was cancelled; None for nothing. Its message arrives while the event loop stands
    still, and it is cancelled as many turns later."""
    assert select.select([socket.fileno()], [], [], 10)[0]
    await turns(after)
    receiving.cancel()
    try:
        return await receiving
    except asyncio.CancelledError:
        return None


@asynchronous
async def test_what_has_come_meanwhile_is_received_together_in_order_and_no_more_than_asked_for() -> None:
    """All have been sent when the first is received, and the others arrive faster than they are taken."""
    server, client = pair()
    for number in range(CLIENT_QUEUE):
        await client.send(Ask(asked=number))
    received, together = [], []
    while len(received) < CLIENT_QUEUE:
        some = await server.receive_some(3)
        together.append(len(some))
        received += [message.asked for _, message, _ in some]
    assert received == list(range(CLIENT_QUEUE))
    assert 1 < max(together) <= 3
    close(server, client)


@asynchronous
async def test_a_peer_that_returns_under_its_identity_takes_its_old_place() -> None:
    server, client = pair()
    await client.send(Ask(asked=1))
    await server.receive()
    returned = Client(server.address, Ack, b"worker-0")
    await returned.send(Ask(asked=2))
    assert (await server.receive())[:2] == (b"worker-0", Ask(asked=2))
    await server.send(b"worker-0", Ack(lease_id=3))
    assert (await returned.receive())[0] == Ack(lease_id=3)
    close(server, client, returned)


@asynchronous
async def test_the_kernel_probes_the_idle_links_of_a_server() -> None:
    server, client = pair()
    await client.send(Ask(asked=1))
    await server.receive()
    here = f":{int(server.address.rsplit(':', 1)[1]):04X}"

    def timers() -> list[str]:
        """Of each connection to the server."""
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [row[5].split(":")[0] for row in rows if row[1].endswith(here) and row[3] == ESTABLISHED]

    await until(lambda: timers() == [KEEPALIVE])
    close(server, client)


@asynchronous
async def test_a_frame_above_the_limit_is_not_received_and_others_are_served() -> None:
    limits = Limits(header_bytes=1000, frame_bytes=1000)
    server = Server(Ask, limits=limits)
    flood = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    flood.set(zmq.LINGER, 0)
    flood.connect(server.address)
    await flood.send_multipart([b"\x80", bytes(1001)])
    await asyncio.sleep(0.1)
    client = Client(server.address, Ack, b"worker-1", limits)
    await client.send(Ask(asked=1))
    assert (await server.receive())[0] == b"worker-1"
    close(server, client, flood)


@asynchronous
async def test_too_many_frames_are_malformed() -> None:
    server = Server(Ask)
    flood = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    flood.set(zmq.LINGER, 0)
    flood.connect(server.address)
    await flood.send_multipart([b"\x80"] * 10_000)
    _, message, buffers = await server.receive()
    assert isinstance(message, Malformed)
    assert str(message).startswith("10000 frames")
    assert not buffers
    close(server, flood)


@asynchronous
async def test_a_server_whose_port_is_taken_leaves_nothing_open() -> None:
    server = Server(Ask, curve=RunKeys.make().server)
    num_tasks = len(asyncio.all_tasks())
    with pytest.raises(zmq.ZMQError, match="in use"):
        Server(Ask, port=int(server.address.rsplit(":", 1)[1]), curve=RunKeys.make().server)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == num_tasks
    server.close()


def pair() -> tuple[Server, Client]:
    server = Server(Ask | Hello)
    return server, Client(server.address, Ack, b"worker-0")


def close(*sockets: Server | Client | zmq.asyncio.Socket) -> None:
    for socket in sockets:
        socket.close()
