"""A session of Ray: connected to a cluster, or to a Ray of our own, from the start of a command to its end.

In: a configuration. Out: Ray, ready for actors. Invariant: whatever ends the command, every process of our own Ray ends
with it. Raises UserError where no cluster answers. Does not own: how our own Ray is started, and how a Ray's death is
noticed (`ray_servers`), what runs on it (`fleet`).
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from asyncdapo.config.config import Config
from asyncdapo.controller.process.ray_servers import RayDied, close_own, start_own
from asyncdapo.controller.process.reaper import adopt_orphans
from asyncdapo.errors import UserError

CLUSTER_ANSWERS_S = 20.0
"""Within which a cluster that is to be joined says that it is there."""


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connected to `controller.ray_address`, or to a Ray of our own on this machine; every process ends with it. A Ray
    that died is left as it is, with the directory of its logs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = config.controller.ray_address
    if address:
        _check_cluster(address)
    with ExitStack() as end:
        end.callback(ray.shutdown)
        adopt_orphans(True)
        with _signals_held():
            if address:
                ray.init(address=address, **quiet)
            else:
                end.callback(close_own, start_own(**quiet))
        adopt_orphans(False)
        end.callback(adopt_orphans, True)
        try:
            yield
        except RayDied:
            end.pop_all()
            atexit.register(os._exit, 1)  # before Ray's own end, which would wait for its dead
            raise


def _check_cluster(address: str) -> None:
    """Whether a cluster answers. `ray.init` would try for minutes, and print as long, so a process asks that can be
    ended."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=CLUSTER_ANSWERS_S
        )
    except subprocess.TimeoutExpired:
        said = f"nothing within {CLUSTER_ANSWERS_S:g} s"
    else:
        if asked.returncode == 0:
            return
        last = (asked.stdout.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        said = textwrap.shorten(last, 160, placeholder=" …")
    fix = "`ray start --head` first, or leave controller.ray_address out"
    raise UserError(f"controller.ray_address: no Ray cluster answers at {address} ({fix}; Ray says: {said})")


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM count when the body is done: a Ray that is interrupted while it starts may crash. The second
    one doesn't wait. Afterwards the handlers from before are back, not those of Ray."""
    received: list[int] = []

    def hold(sent: int, frame: object) -> None:
        received.append(sent)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {sent: signal.signal(sent, hold) for sent in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)
    if received:
        raise KeyboardInterrupt
