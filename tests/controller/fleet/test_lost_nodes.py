"""What a run does when the node of replay or learner is gone. Ray and processes are a few lines here."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from asyncdapo.config.config import Config
from asyncdapo.config.run import ControllerConfig, RunConfig
from asyncdapo.controller.fleet import fleet as fleets
from asyncdapo.controller.fleet import rooms
from asyncdapo.controller.fleet.placement import Bundle
from asyncdapo.controller.fleet.process import Process, ProcessDied
from asyncdapo.controller.fleet.rooms import Room
from asyncdapo.controller.fleet.supervisor import Supervisor
from asyncdapo.controller.process.restarts import TooManyDeaths
from asyncdapo.errors import RunError
from asyncdapo.model.config import ModelConfig
from tests.controller.fleet.test_fleet import FakeWorker, fleet_on


def room_of(monkeypatch: pytest.MonkeyPatch, *states: str) -> Room:
    """Ray finds it in the last of these states, which follow each other from look to look."""
    seen = iter(states)

    def table(group: object) -> dict[str, Any]:
        return {"state": next(seen, states[-1]), "bundles_to_node_id": {0: "node-7"}}

    monkeypatch.setattr(rooms, "placement_group_table", table)
    monkeypatch.setattr(rooms, "LOOK_S", 0.001)
    return Room(Bundle(("replay",)), SimpleNamespace())


def test_a_process_whose_node_is_gone_waits_for_room_on_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    room = room_of(monkeypatch, "RESCHEDULING", "RESCHEDULING", "CREATED")
    asyncio.run(room.found("replay", 5))
    assert room.node() == "node-7"


def test_without_room_the_run_ends_with_what_was_asked_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"replay has lost its node, and Ray has no room for it \(0.1 CPU and 0 GPU\) within .*the same command"
    with pytest.raises(RunError, match=said):
        asyncio.run(room_of(monkeypatch, "RESCHEDULING").found("replay", 0.01))


@pytest.mark.parametrize(("said", "counts"), [("its node has died. Node Id: 7", False), ("it was killed", True)])
def test_a_life_that_began_on_a_node_that_was_gone_is_no_death_of_the_budget(
    said: str, counts: bool, tmp_path: Path
) -> None:
    async def health() -> None:
        raise RayActorError("a1", f"The actor died unexpectedly before finishing this task.\nIt died because {said}")

    async def scene() -> ProcessDied:
        process = Process("rollout-1", lambda: SimpleNamespace(health=SimpleNamespace(remote=health)))
        process.spawn()
        with pytest.raises(ProcessDied) as death:
            await process.health()
        return death.value

    config = Config(model=ModelConfig(path="none"), run=RunConfig(dir=str(tmp_path)))
    supervisor = Supervisor(replace(config, controller=ControllerConfig(max_restarts=0)))
    death = asyncio.run(scene())
    with pytest.raises(TooManyDeaths, match="killed") if counts else nullcontext():
        assert supervisor.count_death("rollout-1", death) == 0.0


@pytest.mark.parametrize("address", ["here", "elsewhere"])
def test_only_a_replay_server_that_has_moved_starts_its_peers_again(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, replay, worker = fleet_on(0, tmp_path), FakeWorker(name="replay"), FakeWorker()
    fleet.replay, fleet.workers, fleet.opened = replay, [worker], SimpleNamespace(rollout_address="here", ports=(1, 2))
    worker.up.set()

    async def bring_up(*args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(rollout_address=address, ports=(1, 2))

    monkeypatch.setattr(fleets, "_bring_up_replay", bring_up)
    asyncio.run(fleet._revive_replay(RunError("replay: the process died")))
    assert worker.up.is_set() == (address == "here")
    assert fleet.opened.rollout_address == address
