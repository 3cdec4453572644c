"""Rooms: where Ray lets the processes of a run live.

In: a placement. Out: a room for each process, all of them there; later a room for one more worker, which may be there
at once, when a node joins or another leaves, or never. A room that is asked for and isn't there is a demand that Ray's
autoscaler sees. Invariant: a rollout worker that is alone in its bundle has a room by itself, so that it can be given
back and asked for again on another node; all others have rooms of one reservation, for as long as the run lasts.
Does not own: who lives with whom (`placement`), who asks for a room when (`elastic`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state as ray_state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from asyncdapo.controller.fleet.placement import Bundle, Placement
from asyncdapo.errors import RunError

CPUS_PER_PROCESS = 0.1
"""Asked of Ray: small, so that every process is placed even on one core. Threads are what the config says."""


LOOK_S = 1.0
"""Between two looks for a room."""


@dataclass(frozen=True)
class Room:
    """For the processes of a bundle."""

    bundle: Bundle
    group: PlacementGroup
    index: int = 0
    """Of the bundle in the group."""

    @classmethod
    def asked_for(cls, bundle: Bundle) -> Room:
        """A room by itself, which may not be there yet."""
        return cls(bundle, _ask_for([bundle]))

    def options(self) -> dict[str, Any]:
        """With which Ray starts a process in it."""
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.index)
        return {"num_cpus": CPUS_PER_PROCESS, "num_gpus": self.bundle.share, "scheduling_strategy": strategy}

    def node(self) -> str:
        """The id of the node that it is on; empty while it isn't there."""
        table = placement_group_table(self.group)
        return table["bundles_to_node_id"][self.index] if table["state"] == "CREATED" else ""

    async def found(self, whose: str, timeout_s: float) -> None:
        """Wait until it is there, on another node if its own is gone. `whose`: for the RunError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not await asyncio.to_thread(self.node):
            if time.monotonic() > deadline:
                raise RunError(
                    f"{whose} has lost its node, and Ray has no room for it ({self}) within "
                    f"controller.place_timeout_s ({timeout_s:g} s): the same command resumes where there is room"
                )
            await asyncio.sleep(LOOK_S)

    def give_back(self) -> None:
        """Nobody lives in it any more. Only of a room by itself."""
        remove_placement_group(self.group)

    def __str__(self) -> str:
        return _amounts(_resources(self.bundle))


def gpus_of_nodes() -> list[int]:
    """GPUs of each node of the cluster, those in use included."""
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that Ray is about to take away: its autoscaler, or a preemption. Ray places nothing on them."""
    return frozenset(ray_state.state.get_draining_nodes())


async def reserve(placement: Placement, timeout_s: float) -> dict[str, Room]:
    """A room for every process, by its name. Lone workers go first: the room of an engine is all on one node. Raises
    RunError that names what was asked and what there is."""
    lone = [bundle for bundle in placement.bundles if bundle.is_lone_worker]
    others = [bundle for bundle in placement.bundles if not bundle.is_lone_worker]
    rooms = [Room.asked_for(bundle) for bundle in lone]
    group = _ask_for(others)
    rooms += [Room(bundle, group, index) for index, bundle in enumerate(others)]
    deadline = time.monotonic() + timeout_s
    for room in rooms:
        if not await asyncio.to_thread(room.group.wait, max(0.0, deadline - time.monotonic())):
            asked = Counter()
            for bundle in placement.bundles:
                asked.update(_resources(bundle))
            raise RunError(
                f"no room on Ray within controller.place_timeout_s ({timeout_s:g} s): {placement.num_processes} "
                f"processes ask for {_amounts(asked)}, there are {_amounts(ray.cluster_resources())}, "
                f"of which {_amounts(ray.available_resources())} are free"
            )
    return {name: room for room in rooms for name in room.bundle.processes}


def _ask_for(bundles: Sequence[Bundle]) -> PlacementGroup:
    return placement_group([_resources(bundle) for bundle in bundles], strategy="PACK")


def _resources(bundle: Bundle) -> dict[str, float]:
    cpus = {"CPU": CPUS_PER_PROCESS * len(bundle.processes)}
    return cpus | ({"GPU": bundle.num_gpus} if bundle.num_gpus else {})


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
