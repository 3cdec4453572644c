"""The port against clients that may do anything: each is answered or cut off, and the others don't notice."""

from __future__ import annotations

import asyncio
import os

import pytest

from asyncdapo.rollout.endpoint import http
from tests.asynchronous import asynchronous, until
from tests.rollout.endpoint.calling import Called, ask, called, dial, exchange

GOOD = b"POST /inference/v1/generate HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: 17\r\n\r\n" + (
    b'{"token_ids":[1]}'
)


async def assert_serves(it: Called) -> None:
    assert (await it.generate([1], max_tokens=1))[0] == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),  # no host
        (b"A" * 100_000, 431),
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 20_000, 431),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n" + b"x" * 3_000_000, 413),
        (b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 401),
        (b"OPTIONS * HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: close\r\n\r\n", 401),
    ],
)
@asynchronous
async def test_what_is_no_request_gets_an_answer_and_the_connection_ends(sent: bytes, status: int) -> None:
    async with called() as it:
        assert (await exchange(it.endpoint.url, sent))[0] == status
        await assert_serves(it)


@asynchronous
async def test_random_bytes_end_no_one_but_their_sender() -> None:
    async with called() as it:
        for _ in range(50):
            _, writer = await dial(it.endpoint.url)
            writer.write(os.urandom(300) + b"\r\n\r\n")
            writer.close()
        await assert_serves(it)


@asynchronous
async def test_a_connection_carries_request_after_request_also_those_sent_ahead() -> None:
    async with called() as it:
        reader, writer = await dial(it.endpoint.url)
        writer.write(GOOD % it.key.encode() * 3)
        for _ in range(3):
            assert await reader.readline() == b"HTTP/1.1 200 \r\n"
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()


@asynchronous
async def test_who_sends_too_much_ahead_is_cut_off_and_its_call_withdrawn() -> None:
    async with called() as it:
        it.attempt._engine.gate.clear()
        reader, writer = await dial(it.endpoint.url)
        writer.write(GOOD % it.key.encode())
        await until(lambda: it.attempt._engine.num_outstanding == 1)
        writer.write(b"x" * (1 << 20))
        with pytest.raises(ConnectionError):
            await reader.readexactly(1)
        await until(lambda: it.attempt._engine.num_outstanding == 0)


@asynchronous
async def test_connections_without_a_whole_request_end_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_TIMEOUT_S", 0.05)
    async with called() as it:
        whole = GOOD % it.key.encode()
        for sent in (b"", b"GET ", whole[:-5], b"POST / HTTP/1.1\r\nhost: x\r\n"):
            reader, writer = await dial(it.endpoint.url)
            writer.write(sent)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            writer.close()
        await assert_serves(it)


@asynchronous
async def test_connections_beyond_the_bound_are_refused() -> None:
    async with called() as it:
        assert it.endpoint._open.max_connections > 100
        it.endpoint._open.max_connections = 3
        held = [await dial(it.endpoint.url) for _ in range(3)]
        with pytest.raises((ConnectionError, IndexError)):
            await ask(it.endpoint.url, "GET", "/v1/models")
        held[0][1].close()
        await until(lambda: len(it.endpoint._open.connections) == 2)
        await assert_serves(it)


@asynchronous
async def test_only_this_machine_can_reach_it() -> None:
    async with called() as it:
        assert it.endpoint.url.startswith("http://127.0.0.1:")
