"""Stand-in nodes: a Ray cluster of several raylets on this machine, each with an address and a host of its own.

In: names of nodes. Out: a cluster that a launch can join, whose nodes come and lose power. The processes
of a node take one another for those of one machine, and those of other nodes for out of reach (`transport.backend`'s
`HOST_ID`), so no pid, no shared memory and no loopback address leads from one node to another.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from asyncdapo.transport.backend import HOST_ID


class Nodes:
    """A head, on which a launch runs, and the nodes beside it."""

    def __init__(self, num_cpus: int) -> None:
        """`num_cpus`: of the head, logical ones: a process asks for a tenth."""
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, **_quiet()})
        self._nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        """That `controller.ray_address` takes."""
        return str(self._cluster.address)

    def add(self, name: str, num_cpus: int = 1) -> None:
        """A node that is there when this returns. Each has an address of its own on loopback."""
        ip = f"127.0.0.{2 + len(self._nodes)}"
        self._nodes[name] = self._cluster.add_node(
            num_cpus=num_cpus, node_ip_address=ip, env_vars={HOST_ID: name}, **_quiet()
        )

    def cut_power(self, name: str) -> None:
        """Every process of the node ends at the same moment, without a word."""
        node = self._nodes[name]
        raylets = [psutil.Process(server.process.pid) for server in node.all_processes["raylet"]]
        for process in [process for raylet in raylets for process in (raylet, *raylet.children(recursive=True))]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def nodes(*names: str, head_cpus: int = 1) -> Iterator[Nodes]:
    """These nodes and a head, gone afterwards."""
    cluster = Nodes(head_cpus)
    try:
        for name in names:
            cluster.add(name)
        yield cluster
    finally:
        cluster.close()


def drain(address: str, node_id: str) -> None:
    """Have the cluster drain a node, as Ray's autoscaler does it."""
    options = {
        "--address": address,
        "--node-id": node_id,
        "--reason": "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message": "a test",
        "--deadline-remaining-seconds": "60",
    }
    words = [word for option in options.items() for word in option]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", *words], check=True)


def node_of(host: str) -> str:
    """Of the name of a host: what stands behind that of this machine."""
    return host.partition("/")[2]


def _quiet() -> dict[str, Any]:
    return {"include_dashboard": False}
