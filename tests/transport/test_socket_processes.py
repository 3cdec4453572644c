"""Processes that end while their sockets are busy, and one that must not end: real ones on the loopback interface."""

from __future__ import annotations

import asyncio
import sys

from asyncdapo.messages import Ack, Ask
from asyncdapo.transport.codec import Malformed
from asyncdapo.transport.sockets import Client, Server
from tests.asynchronous import asynchronous

FRAMES = [b"x" * (1 << 16)] * 5
CLIENTS_THAT_END = """
import asyncio, os, sys
from asyncdapo.messages import Ack, Ask
from asyncdapo.transport.sockets import Client
from tests.transport.test_socket_processes import FRAMES

async def main():
    clients = [Client(sys.argv[1], Ack, b"worker-%d-%d" % (os.getpid(), number)) for number in range(8)]
    for number in range(100):
        for client in clients:
            await client.send(Ask(asked=number), FRAMES)

asyncio.run(main())
"""
A_SERVER_THAT_ENDS = """
import asyncio
from asyncdapo.messages import Ack, Ask
from asyncdapo.transport.sockets import Server
from tests.transport.test_socket_processes import FRAMES

async def main():
    server = Server(Ask)
    print(server.address, flush=True)
    peer, _, _ = await server.receive()
    for number in range(800):
        await server.send(peer, Ack(lease_id=number), FRAMES)

asyncio.run(main())
"""


@asynchronous
async def test_clients_whose_process_ends_while_they_send_end_cleanly_and_send_nothing_else() -> None:
    server, num_damaged = Server(Ask), 0

    async def read() -> None:
        nonlocal num_damaged
        while True:
            _, message, buffers = await server.receive()
            num_damaged += isinstance(message, Malformed) or buffers != FRAMES

    reading = asyncio.create_task(read())
    started = [await process_of(CLIENTS_THAT_END, server.address) for _ in range(4)]
    assert [await end_of(process) for process in started] == [(0, b"")] * 4
    assert not num_damaged
    reading.cancel()
    server.close()


@asynchronous
async def test_a_server_whose_process_ends_while_it_sends_ends_cleanly() -> None:
    process = await process_of(A_SERVER_THAT_ENDS)
    assert process.stdout is not None
    client: Client[Ack] = Client((await process.stdout.readline()).decode().strip(), Ack, b"worker-0")
    await client.send(Ask(asked=1))
    _, buffers = await client.receive()
    assert buffers == FRAMES
    assert await end_of(process) == (0, b"")
    client.close()


A_SERVER_WHOSE_PEER_RETURNS = """
import asyncio
from asyncdapo.messages import Ack, Ask
from asyncdapo.transport import sockets
from tests.transport.test_socket_processes import FRAMES

sockets.PROBE_INTERVAL_MS = 20

async def main():
    server = sockets.Server(Ask)
    for name in (b"worker-0", b"worker-1", b"worker-2"):
        client = sockets.Client(server.address, Ack, name)
        sending = asyncio.create_task(send_all(client))
        while (await server.receive())[0] != name:
            pass
        returned = sockets.Client(server.address, Ack, name)
        await returned.send(Ask(asked=-1))
        while (await server.receive())[1] != Ask(asked=-1):
            pass
        await asyncio.sleep(0.1)
        sending.cancel()
        client.close()
        await asyncio.sleep(0.1)
        returned.close()

async def send_all(client):
    while True:
        await client.send(Ask(asked=1), FRAMES)

asyncio.run(main())
"""


@asynchronous
async def test_a_link_that_is_lost_behind_its_successor_with_messages_unread_does_not_end_the_server() -> None:
    """ZeroMQ probes such a link once more, and ends the process because it is gone."""
    assert await end_of(await process_of(A_SERVER_WHOSE_PEER_RETURNS)) == (0, b"")


async def process_of(program: str, *args: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-c", program, *args, stdout=pipe, stderr=pipe)


async def end_of(process: asyncio.subprocess.Process) -> tuple[int | None, bytes]:
    """Its exit code, and what it complained about."""
    _, said = await process.communicate()
    return process.returncode, said
