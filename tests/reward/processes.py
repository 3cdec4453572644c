"""Pools of real processes, and what has become of a process."""

import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil

from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.registry import VERIFIERS

FILE = Path(__file__).with_name("verifiers.py")


@asynccontextmanager
async def running(function="obey", num_processes=1, timeout_s=20.0, **keys):
    """`function` is a verifier of ours, or one of those in `verifiers.py`."""
    verifier = function if function in VERIFIERS else f"{FILE}:{function}"
    pool = ScorerPool(verifier, num_processes, timeout_s, **keys)
    await pool.start()
    pids = pool.pids()
    try:
        yield pool
    finally:
        pids += pool.pids()
        await pool.stop()
        assert not any(map(is_alive, pids))


def is_alive(pid):
    """There, and no zombie."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def gone_within(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def cpu_s(pid):
    """Time it has computed: a process that rises is in the middle of something."""
    return psutil.Process(pid).cpu_times().user
