"""The family of an engine, with real processes: who belongs to it, and that all of it ends."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from asyncdapo.errors import EngineError
from asyncdapo.rollout.vllm_engine.processes import Family
from tests.asynchronous import asynchronous
from tests.reward.processes import is_alive

SPAWN = multiprocessing.get_context("spawn")


def core(ready: Connection) -> None:
    """As the engine core does: starts a worker, and a helper that is none."""
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    worker = SPAWN.Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    ready.send((worker.pid, helper.pid))
    time.sleep(60)


@asynchronous
async def test_workers_below_the_engine_core_belong_to_the_family_helpers_dont_and_an_end_is_noticed_at_once() -> None:
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=core, args=(there,))
    process.start()
    assert here.poll(30)
    worker, helper = here.recv()
    family = Family([process.pid])
    assert sorted(family.pids()) == sorted([process.pid, worker])

    ended = asyncio.get_running_loop().create_future()
    family.watch(ended.set_result)
    psutil.Process(worker).kill()
    assert await asyncio.wait_for(ended, 10) == worker
    family.unwatch()

    family.end(timeout_s=0.0)
    assert not any(map(is_alive, (process.pid, worker)))
    process.join(10)
    assert process.exitcode == -9
    psutil.Process(helper).kill()
    with pytest.raises(EngineError, match="ended as soon as it had started"):
        Family([process.pid])
