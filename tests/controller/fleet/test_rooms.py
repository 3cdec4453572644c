"""Rooms on a real cluster whose nodes come and go. Two raylets on this machine stand in for two nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.placement import Bundle, learner_names, place
from asyncdapo.controller.fleet.rooms import Room, draining_nodes, gpus_of_nodes, reserve
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.model.config import ModelConfig
from asyncdapo.rollout.config import RolloutConfig
from tests.controller.nodes import drain

pytestmark = [pytest.mark.soak, pytest.mark.timeout(180)]
WORKER = Bundle(("rollout-1",), 2)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Its head has a GPU too few."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def until(true: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_room_is_there_once_a_node_has_it_and_is_found_again_when_that_node_goes(cluster: Cluster) -> None:
    room = Room.asked_for(WORKER)
    time.sleep(2)
    assert room.node() == ""
    first = cluster.add_node(num_cpus=1, num_gpus=2)
    until(lambda: room.node() == first.node_id)
    cluster.remove_node(first)
    until(lambda: room.node() == "")
    second = cluster.add_node(num_cpus=1, num_gpus=2)
    until(lambda: room.node() == second.node_id)
    other = Room.asked_for(WORKER)
    assert other.node() == ""
    room.give_back()
    until(lambda: other.node() == second.node_id)


def test_a_room_given_back_on_a_node_that_ray_drains_is_found_on_another(cluster: Cluster) -> None:
    first = cluster.add_node(num_cpus=1, num_gpus=2)
    room = Room.asked_for(WORKER)
    until(lambda: room.node() == first.node_id)
    drain(cluster.address, first.node_id)
    until(lambda: first.node_id in draining_nodes())
    second = cluster.add_node(num_cpus=1, num_gpus=2)
    room.give_back()
    again = Room.asked_for(WORKER)
    until(lambda: again.node() == second.node_id)


def test_the_ranks_of_a_replica_are_together_on_a_node_and_so_are_the_gpus_of_an_engine(cluster: Cluster) -> None:
    """Two replicas of two shards and an engine of two GPUs, on three nodes of two."""
    for _ in range(3):
        cluster.add_node(num_cpus=1, num_gpus=2)
    until(lambda: sorted(gpus_of_nodes()) == [1, 2, 2, 2])
    config = Config(
        model=ModelConfig(path="none"),
        learner=LearnerConfig(ranks=4, shards=2),
        rollout=RolloutConfig(engine="vllm", num_workers=1, tensor_parallel=2),
    )
    rooms = asyncio.run(reserve(place(config, gpus_of_nodes(), learner_names(config)), 30))
    home = {name: room.node() for name, room in rooms.items()}
    assert home["learner"] == home["learner-1"]
    assert home["learner-2"] == home["learner-3"]
    assert len({home["learner"], home["learner-2"], home["rollout-0"]}) == 3
