"""Closed doors: without an allowed key nothing reaches the application, with one everything does."""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace

import pytest
import zmq
import zmq.asyncio

from asyncdapo.errors import UserError
from asyncdapo.messages import Ack, Ask
from asyncdapo.transport.codec import Limits, encode
from asyncdapo.transport.keys import ClientKeys, RunKeys
from asyncdapo.transport.sockets import Client, Server
from tests.asynchronous import asynchronous

GARBAGE_BYTES = 4096
GREETING_BYTES = 64
STRANGER_S = 0.5
"""How long a stranger knocks: some five of its attempts to connect."""


@asynchronous
async def test_with_keys_messages_and_buffers_travel_both_ways() -> None:
    async with closed_server() as (server, keys):
        with client_of(server, keys.client) as client:
            await client.send(Ask(asked=1), [b"tokens"])
            peer, message, [buffer] = await server.receive()
            assert (peer, message, bytes(buffer)) == (b"worker-0", Ask(asked=1), b"tokens")
            await server.send(peer, Ack(lease_id=7), [bytes(1 << 20)])
            message, [buffer] = await client.receive()
            assert (message, len(buffer)) == (Ack(lease_id=7), 1 << 20)


def no_key(keys: RunKeys) -> None:
    return None


def key_of_another_run(keys: RunKeys) -> ClientKeys:
    return replace(RunKeys.make().client, server=keys.server.public)


def servers_own_key(keys: RunKeys) -> ClientKeys:
    return ClientKeys(public=keys.server.public, secret=keys.server.secret, server=keys.server.public)


def public_key_without_its_secret(keys: RunKeys) -> ClientKeys:
    return replace(keys.client, secret=RunKeys.make().client.secret)


def another_server(keys: RunKeys) -> ClientKeys:
    return replace(keys.client, server=RunKeys.make().server.public)


STRANGERS = [no_key, key_of_another_run, servers_own_key, public_key_without_its_secret, another_server]


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_reaches_nobody_and_valid_peers_are_served_meanwhile(stranger) -> None:
    @asynchronous
    async def run() -> None:
        async with closed_server() as (server, keys):
            with eager_stranger(server.address, stranger(keys)) as knocking, client_of(server, keys.client) as client:
                for number in range(200):
                    with suppress(zmq.Again):  # ZeroMQ gives up on a server that has refused it
                        await knocking.send_multipart(encode(Ask(asked=-1)), zmq.NOBLOCK)
                    await client.send(Ask(asked=number))
                    assert (await server.receive())[:2] == (b"worker-0", Ask(asked=number))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(server.receive(), STRANGER_S)
                assert not await knocking.poll(0)
            if stranger in (key_of_another_run, servers_own_key):
                assert server.num_refused > 0

    run()


@asynchronous
async def test_raw_bytes_on_the_port_reach_nobody_and_their_connection_is_closed() -> None:
    open_door, closed_door = (
        b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)
        for mechanism in (b"NULL", b"CURVE")
    )
    noises = [
        bytes(range(256)) * 16,
        b"GET / HTTP/1.1\r\n\r\n" * 100,
        b"\xff" * 2000,
        open_door + b"\x00\x05hello" * 1000,
        closed_door + b"\x04\xc8\x05HELLO" + bytes(194),
        closed_door + b"\x06" + (1 << 40).to_bytes(8, "big") + bytes(1000),
    ]
    async with closed_server() as (server, keys):
        host, port = server.address.removeprefix("tcp://").split(":")
        with client_of(server, keys.client) as client:
            for number, noise in enumerate(noises):
                with closing(socket.create_connection((host, int(port)))) as knocking:
                    await send_slowly(knocking, noise[:GREETING_BYTES], noise[GREETING_BYTES:])
                    assert await until_closed(knocking) < GARBAGE_BYTES
                await client.send(Ask(asked=number))
                assert (await server.receive())[1] == Ask(asked=number)
        assert not server.num_malformed


@asynchronous
async def test_a_recorded_conversation_that_a_stranger_sends_again_is_not_heard_again() -> None:
    async with closed_server() as (server, keys), recorded(server.address) as (address, sent):
        with closing(Client(address, Ack, b"worker-0", curve=keys.client)) as client:
            await client.send(Ask(asked=1), [b"tokens"])
            assert (await server.receive())[1] == Ask(asked=1)
        host, port = server.address.removeprefix("tcp://").split(":")
        with closing(socket.create_connection((host, int(port)))) as stranger:
            await send_slowly(stranger, *sent)
        with client_of(server, keys.client) as client:
            await client.send(Ask(asked=2))
            assert (await server.receive())[1] == Ask(asked=2)


@asynchronous
async def test_two_servers_of_one_process_have_a_door_each() -> None:
    async with closed_server() as (first, keys), closed_server() as (second, other_keys):
        with client_of(first, keys.client) as mine, client_of(second, keys.client) as stranger:
            await mine.send(Ask(asked=1))
            assert (await first.receive())[1] == Ask(asked=1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stranger.send(Ask(asked=2)), STRANGER_S)
        with client_of(second, other_keys.client) as client:
            await client.send(Ask(asked=3))
            assert (await second.receive())[1] == Ask(asked=3)


@asynchronous
async def test_a_client_comes_back_to_a_restarted_server_with_the_same_keys_and_to_no_other() -> None:
    keys = RunKeys.make()
    server = Server(Ask, curve=keys.server)
    port = int(server.address.rsplit(":", 1)[1])
    with client_of(server, keys.client) as client:
        await client.send(Ask(asked=1))
        await server.receive()
        server.close()
        impostor = Server(Ask, port=port, curve=RunKeys.make().server)
        await asyncio.sleep(STRANGER_S)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.send(Ask(asked=2)), STRANGER_S)
        impostor.close()
        server = Server(Ask, port=port, curve=keys.server)
        await client.send(Ask(asked=3))
        peer, message, _ = await server.receive()
        assert message == Ask(asked=3)
        await server.send(peer, Ack(lease_id=3))
        assert (await client.receive())[0] == Ack(lease_id=3)
        server.close()


@asynchronous
async def test_while_nobody_answers_for_the_door_nobody_enters() -> None:
    async with closed_server() as (server, keys):
        server._door.close()
        with client_of(server, keys.client) as client, pytest.raises(TimeoutError):
            await asyncio.wait_for(client.send(Ask(asked=1)), STRANGER_S)


@asynchronous
async def test_a_frame_as_large_as_the_limit_passes_encrypted_too() -> None:
    limits = Limits(header_bytes=1000, frame_bytes=1000)
    async with closed_server(limits=limits) as (server, keys):
        with closing(Client(server.address, Ack, b"worker-0", limits, keys.client)) as client:
            await client.send(Ask(asked=1), [bytes(1000)])
            assert len((await server.receive())[2][0]) == 1000


def test_keys_reach_another_process_whole_and_their_secrets_reach_no_log() -> None:
    keys = RunKeys.make()
    assert pickle.loads(pickle.dumps(keys)) == keys
    for secret in (keys.server.secret, keys.client.secret):
        assert len(secret) == 40
        assert secret.decode() not in repr(keys) + str(keys) + f"{keys.server} {keys.client}"


def test_a_libzmq_without_curve_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    with pytest.raises(UserError, match="built without CURVE.*pip install"):
        RunKeys.make()


@asynccontextmanager
async def closed_server(**settings: Limits) -> AsyncIterator[tuple[Server, RunKeys]]:
    keys = RunKeys.make()
    with closing(Server(Ask, curve=keys.server, **settings)) as server:
        yield server, keys


def client_of(server: Server, keys: ClientKeys):
    return closing(Client(server.address, Ack, b"worker-0", curve=keys))


@asynccontextmanager
async def recorded(address: str) -> AsyncIterator[tuple[str, list[bytes]]]:
    """An address by which clients reach the server at `address`, and what they have sent there, piece by piece."""
    sent, tasks = list[bytes](), set[asyncio.Task[None]]()

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, noted: list[bytes]) -> None:
        while part := await source.read(GARBAGE_BYTES):
            noted.append(part)
            sink.write(part)
        sink.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*address.removeprefix("tcp://").split(":"))
        ways = carry(reader, far_writer, sent), carry(far_reader, writer, [])
        tasks.update(map(asyncio.create_task, ways))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as listener:
        yield f"tcp://127.0.0.1:{listener.sockets[0].getsockname()[1]}", sent
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def eager_stranger(address: str, keys: ClientKeys | None):
    """A peer that speaks as soon as it can; unlike `Client` it queues what it can't send yet."""
    stranger = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    stranger.set(zmq.LINGER, 0)
    stranger.set(zmq.SNDHWM, 0)
    if keys:
        keys.apply(stranger)
    stranger.connect(address)
    with closing(stranger):
        yield stranger


async def send_slowly(connection: socket.socket, *parts: bytes) -> None:
    """ZeroMQ hangs up on whoever doesn't wait for its greeting, and would read nothing of what follows."""
    connection.setblocking(False)
    for part in parts:
        with suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(connection, part)
        await asyncio.sleep(0.01)


async def until_closed(connection: socket.socket) -> int:
    """Read until the other end hangs up; how much it said."""
    loop, num_bytes = asyncio.get_running_loop(), 0
    try:
        while received := await loop.sock_recv(connection, GARBAGE_BYTES):
            num_bytes += len(received)
    except ConnectionResetError:
        pass
    return num_bytes
