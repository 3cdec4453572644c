"""A child process: its end takes with it whatever it has started."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

import psutil
import pytest

from asyncdapo.child.process import ChildProcess, Launched
from tests.asynchronous import asynchronous, until

LEAVES_BEHIND = """
import socket, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
socket.socket(fileno=0).sendall(str(child.pid).encode())
"""


class Listener(ChildProcess):
    """Keeps what it receives."""

    def __init__(self, launched: Launched) -> None:
        super().__init__(launched, "test process", logging.getLogger("test"))
        self.received = b""
        self.num_released = 0

    def data_received(self, data: bytes) -> None:
        self.received += data

    def release(self) -> None:
        self.num_released += 1


@pytest.mark.parametrize(("then", "how"), [("time.sleep(600)", "killed by SIGKILL"), ("sys.exit(3)", "exit code 3")])
@asynchronous
async def test_a_process_in_a_session_of_its_own_ends_with_the_one_that_started_it(then: str, how: str) -> None:
    process = await Listener.connected(Listener, [sys.executable, "-c", LEAVES_BEHIND + then])
    await until(lambda: process.received)
    left_behind = psutil.Process(int(process.received))
    if "sleep" in then:
        process.kill("took too long")
        process.kill()
        assert process.killed_for == "took too long"
    assert how in await process.end()
    assert process.num_released == 1
    await until(lambda: not left_behind.is_running() or left_behind.status() == psutil.STATUS_ZOMBIE)


@asynchronous
async def test_a_process_that_is_released_is_gone_when_its_end_is_told() -> None:
    process = await Listener.connected(Listener, [sys.executable, "-c", "import time; time.sleep(600)"])
    process.kill()
    assert await asyncio.gather(process.end(), process.end()) == [await process.end()] * 2
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
