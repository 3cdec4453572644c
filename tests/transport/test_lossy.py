"""A bad link on real sockets: what is sent until it is acknowledged arrives all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zmq

from asyncdapo import faults
from asyncdapo.faults import FaultsConfig
from asyncdapo.messages import Ack, Ask
from asyncdapo.transport.codec import Malformed
from asyncdapo.transport.delivery import Outbox
from asyncdapo.transport.sockets import Client, Server
from tests.asynchronous import asynchronous

BAD = {"drop": 0.2, "duplicate": 0.2, "reorder": 0.2, "truncate": 0.1, "delay_s": 0.01}


@asynchronous
async def test_what_is_sent_again_until_acknowledged_arrives_on_a_bad_link(tmp_path: Path) -> None:
    with bad_link(tmp_path, **BAD), pair() as (server, client):
        outbox, arrived, num_messages = Outbox(resend_s=0.3), [], 100

        async def serve() -> None:
            while True:
                peer, message, _ = await server.receive()
                if isinstance(message, Ask):
                    arrived.append(message.asked)
                    await server.send(peer, Ack(lease_id=message.asked))

        async def take_acks() -> None:
            while outbox:
                try:
                    message, _ = await client.receive()
                    outbox.acknowledge(message.lease_id)
                except Malformed:
                    continue

        for number in range(num_messages):
            outbox.put(number, Ask(asked=number), [b"tokens"])
        serving, taking = asyncio.create_task(serve()), asyncio.create_task(take_acks())
        while outbox:
            for message, frames in outbox.due(time.monotonic()):
                await client.send(message, frames)
            await asyncio.sleep(0.01)
        await taking
        serving.cancel()
        assert set(arrived) == set(range(num_messages))
        assert len(arrived) > num_messages
        assert server.num_malformed > 0
        firsts = list(dict.fromkeys(arrived))
        assert firsts != sorted(firsts)


@asynchronous
async def test_late_messages_keep_their_order(tmp_path: Path) -> None:
    with bad_link(tmp_path, delay_s=0.2), pair() as (server, client):
        for number in range(50):
            await client.send(Ask(asked=number))
        assert [(await server.receive())[1].asked for _ in range(50)] == list(range(50))


@asynchronous
async def test_a_message_to_a_peer_that_is_gone_is_counted_on_a_bad_link_too(tmp_path: Path) -> None:
    with bad_link(tmp_path, delay_s=0.01), pair() as (server, _):
        await server.send(b"never seen", Ack(lease_id=1))
        while not server.num_dropped:
            await asyncio.sleep(0.01)


@asynchronous
async def test_what_goes_wrong_in_sending_is_raised_at_the_next_message(tmp_path: Path) -> None:
    with bad_link(tmp_path, delay_s=0.001), pair() as (_, client):
        client._leave()
        await client.send(Ask(asked=1))
        await asyncio.sleep(0.05)
        with pytest.raises(zmq.ZMQError, match="non-socket"):
            await client.send(Ask(asked=2))


@asynchronous
async def test_messages_still_held_at_the_end_are_forgotten(tmp_path: Path) -> None:
    with bad_link(tmp_path, delay_s=5.0), pair() as (_, client):
        for number in range(10):
            await client.send(Ask(asked=number))


@contextmanager
def bad_link(run_dir: Path, **shares: float) -> Iterator[None]:
    faults.install("rollout-0", FaultsConfig(**shares), run_dir)
    try:
        yield
    finally:
        faults.install("rollout-0", FaultsConfig(), run_dir)


@contextmanager
def pair() -> Iterator[tuple[Server, Client]]:
    with closing(Server(Ask)) as server, closing(Client(server.address, Ack, b"worker-0")) as client:
        yield server, client
