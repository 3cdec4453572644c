"""Ray's own processes: how our own Ray starts, closed to others on the machine, and how Ray's death is noticed.

    our own Ray       `start_own`: every port on loopback and behind a token, every socket and log in a directory that
                      only the user can enter; `death`: its GCS and its raylet are watched by their pids
    a joined one      as its owner set it up; `death`: its GCS takes no connections, or counts this node as lost

In: a configuration. Out: Ray started, and RayDied as soon as Ray fails. By itself Ray ends a driver only 60 s after its
GCS has died, with a message of its own, and never after its raylet has died. Invariant: a Ray that would listen on
other interfaces, or without the token, is not used. Does not own: the session around it (`ray_session`).

Holds for Ray 2.52 to 2.60, of which it uses internals: whether this machine can be part of a cluster, how settings are
read again, and which processes a node starts.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import shutil
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import ray
from ray._private import node, ray_constants
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue] (compiled, without a stub)
from ray._raylet import Config as RaySettings  # pyright: ignore[reportAttributeAccessIssue] (compiled, without a stub)

from asyncdapo.controller.process.reaper import is_alive
from asyncdapo.controller.process.surroundings import ray_parent
from asyncdapo.errors import RunError

SERVERS = ("gcs_server", "raylet")
"""Of our own Ray, children of the driver; Ray needs both."""
OBJECT_STORE_BYTES = 100 << 20
"""Ray's shared memory. Commands are small; neither rollouts nor weights go through it."""
LOOK_S = 0.5
"""Time between two checks of the servers of our own Ray."""
PROBE_S = 5.0
"""Time between two probes of a joined cluster, and the timeout of each."""
SILENT_S = 30.0
"""A joined cluster that accepts no connection for this long is dead. Ray itself would end this process after 60 s."""
RESUME = "the same command resumes from the last checkpoint"

log = logging.getLogger("controller")


class BareNode(node.Node):
    """Starts no process of which actors make no use. Each takes half a second of a core, and `ray.init` waits for the
    last one."""

    def start_monitor(self) -> None:
        """No autoscaler."""

    def start_log_monitor(self) -> None:
        """No output of workers on the driver's terminal: each has its log."""

    def start_api_server(self, **_: object) -> None:
        """No dashboard, and no statistics of use."""


class RayDied(RunError):  # noqa: N818 - what happened to it, not a failure of ours
    """Ray has failed, and can't be shut down either."""


def start_own(**options: Any) -> Path:
    """Start a Ray for this process alone. Returns the directory of its files. Raises RunError when it can be reached
    from elsewhere."""
    home = Path(mkdtemp(prefix="ray-", dir=ray_parent()))
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # which would win
    _use({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    node.Node = BareNode
    ray_constants.ENABLE_RAY_CLUSTER = False  # a machine without clusters is what Ray keeps to loopback on
    own: dict[str, Any] = {
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(home / "r"),  # not `home`, which Ray would open to everybody
        "_system_config": {
            "prestart_worker_first_driver": False,  # a process for each core, of no use to actors
            "task_events_report_interval_ms": 0,  # no record of tasks, which only a dashboard would show
            "event_stats": False,  # nor of Ray's own event loops; every process would keep both all the time
            "worker_niceness": 0,  # not Ray's 15, which leaves the cores to whatever else runs on the machine
        },
    }
    ray.init(address="local", **own, **options)
    if not ipaddress.ip_address(host := ray.util.get_node_ip_address()).is_loopback:
        raise RunError(f"Ray {ray.__version__} listens on {host}, for others too: asyncdapo knows Ray 2.52 to 2.60")
    return home


def close_own(home: Path) -> None:
    """Shut it down, and remove its files."""
    ray.shutdown()
    shutil.rmtree(home, ignore_errors=True)  # some of its processes may still be writing
    _use({})


def _use(authentication: dict[str, str]) -> None:
    """Have Ray read these settings, and no others of the kind, from the environment; by itself it reads them once."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ |= authentication
    AuthenticationTokenLoader.instance().reset_cache()
    RaySettings.initialize("")


async def death(address: str | None) -> None:
    """Wait for Ray to fail, and raise RayDied. `address`: of the joined cluster; None for our own Ray."""
    await (_cluster_death(address) if address else _own_death())


async def _own_death() -> None:
    children = [process for process in psutil.process_iter(["name", "ppid"]) if process.info["ppid"] == os.getpid()]
    servers = {process.info["name"]: process for process in children}
    while not (gone := [name for name in SERVERS if name not in servers or not is_alive(servers[name])]):
        await asyncio.sleep(LOOK_S)
    raise RayDied(f"Ray's process {' and '.join(gone)} died; {RESUME}")


async def _cluster_death(address: str) -> None:
    context = ray.get_runtime_context()
    host, port = context.gcs_address.rsplit(":", 1)
    node, heard, alive = context.get_node_id(), time.monotonic(), dict[str, str]()
    while True:
        await asyncio.sleep(PROBE_S)
        try:
            async with asyncio.timeout(PROBE_S):
                _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            if time.monotonic() - heard > SILENT_S:
                raise RayDied(f"the Ray cluster at {address} takes no connections any more; {RESUME}") from None
            continue
        writer.close()
        heard = time.monotonic()
        before, nodes = alive, await asyncio.to_thread(ray.nodes)
        alive = {known["NodeID"]: known["NodeManagerAddress"] for known in nodes if known["Alive"]}
        for gone in before.keys() - alive.keys():
            log.warning("node %s has left the Ray cluster, and all that lived there", before[gone])
        if node not in alive:
            raise RayDied(f"the Ray cluster at {address} has lost the node of this process: its raylet died; {RESUME}")
