"""Workers that join and leave. Processes, rooms and the replay server are a few lines here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from asyncdapo.config.config import Config
from asyncdapo.config.run import ControllerConfig, RunConfig
from asyncdapo.controller.fleet import elastic
from asyncdapo.controller.fleet.elastic import ElasticWorker, ElasticWorkers
from asyncdapo.controller.fleet.placement import Bundle, Placement
from asyncdapo.controller.fleet.process import ProcessDied, Watch
from asyncdapo.controller.fleet.supervisor import Supervisor
from asyncdapo.controller.process import wanted_workers
from asyncdapo.controller.process.health import Health
from asyncdapo.errors import RunError
from asyncdapo.model.config import ModelConfig
from asyncdapo.rollout.config import RolloutConfig
from tests.asynchronous import until
from tests.controller.fakes import picked


class FakeProcess:
    def __init__(self, index: int) -> None:
        self.name, self.life, self.up, self.died = f"rollout-{index}", 0, asyncio.Event(), asyncio.Event()

    def end(self) -> None:
        self.up.clear()


class FakeRoom:
    """Of a cluster with so many places."""

    def __init__(self, cluster: Cluster, bundle: Bundle) -> None:
        self.cluster, self.bundle = cluster, bundle
        cluster.rooms.append(self)

    def node(self) -> str:
        return "a node" if self in self.cluster.rooms[: self.cluster.num_places] else ""

    def give_back(self) -> None:
        self.cluster.rooms.remove(self)

    def __str__(self) -> str:
        return "0.1 CPU"


class Cluster:
    """Places for workers, the fleet that serves them, and the replay server that is told of them."""

    def __init__(self, run_dir: Path, num_places: int, **rollout: Any) -> None:
        self.num_places, self.rooms, self.said, self.late = num_places, [], [], []
        self.config = config = Config(
            model=ModelConfig(path="none"),
            rollout=RolloutConfig(num_workers={"min": 1, "max": 3}, **rollout),
            run=RunConfig(dir=str(run_dir)),
            controller=ControllerConfig(max_restarts=0),
        )
        self.supervisor = Supervisor(config)
        self.processes = [FakeProcess(index) for index in range(3)]
        first = self.processes[0]
        rooms = {first.name: FakeRoom(self, Bundle((first.name,)))}
        self.supervisor.include(first)
        first.up.set()
        keys = {"drain_s": 7.0, "placement": Placement((), "none"), "rooms": rooms}
        self.workers = [
            ElasticWorker(index, process, self, self.supervisor, self, **keys)
            for index, process in enumerate(self.processes)
        ]
        self.elastic = ElasticWorkers(config, self.supervisor, self.workers)
        self.watch = Watch()
        self.elastic.watch(self.watch)

    async def ask(self, pick: Any, *args: Any) -> int:
        self.said.append((picked("replay", pick, *args), *args))
        return 2

    async def bring_up_worker(self, worker: FakeProcess) -> None:
        worker.life += 1
        worker.died.clear()
        worker.up.set()

    async def serve_worker(self, worker: FakeProcess, *, late: bool) -> None:
        self.late.append((worker.name, late))
        await worker.died.wait()
        worker.up.clear()
        raise ProcessDied(worker.name, "killed")

    async def end_worker(self, worker: FakeProcess) -> None:
        worker.end()

    def up(self) -> list[int]:
        return [index for index, process in enumerate(self.processes) if process.up.is_set()]


@pytest.fixture
def acted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Plays a scene with a cluster, with the run watched."""
    monkeypatch.setattr(elastic, "LOOK_S", 0.001)
    monkeypatch.setattr("asyncdapo.controller.fleet.process.CAUSE_GRACE_S", 0.0)
    monkeypatch.setattr("asyncdapo.controller.fleet.supervisor.end_entries", lambda entries, patience_s: None)

    def act(scene: Callable[[Cluster], Awaitable[Any]], *, num_places: int = 9, **rollout: Any) -> Any:
        async def main() -> Any:
            cluster = Cluster(tmp_path, num_places, **rollout)
            monkeypatch.setattr(elastic.Room, "asked_for", lambda bundle: FakeRoom(cluster, bundle))
            return await cluster.watch.guard(scene(cluster))

        return asyncio.run(main())

    return act


def test_a_run_goes_on_with_the_least_and_others_join_when_there_is_room(acted) -> None:
    async def scene(cluster: Cluster) -> None:
        await until(lambda: cluster.supervisor.missing.keys() == {"rollout-1", "rollout-2"})
        assert cluster.up() == [0]
        assert cluster.supervisor.missing["rollout-1"] == "waits for room on Ray (0.1 CPU)"
        cluster.num_places = 2
        await until(lambda: len(cluster.late) == 2)
        assert cluster.up() == [0, 1]
        assert cluster.late == [("rollout-0", False), ("rollout-1", True)], "who joins later lacks the weights"
        assert [process.name for process in cluster.supervisor.processes] == ["rollout-0", "rollout-1"]

    acted(scene, num_places=1)


def test_workers_that_are_too_many_are_drained_and_their_rooms_given_back(acted, tmp_path) -> None:
    async def scene(cluster: Cluster) -> None:
        await until(lambda: cluster.up() == [0, 1, 2])
        wanted_workers.ask_for(tmp_path, 1)
        await cluster.elastic.look({})
        await until(lambda: len(cluster.rooms) == 1)
        assert cluster.up() == [0]
        told = [("drain_worker", 7.0), ("lose_worker", "scaled to 1")]
        for index in (1, 2):
            drains = [(said[0], said[2]) for said in cluster.said if said[1] == index]
            assert drains == told
        wanted_workers.ask_for(tmp_path, 2)
        await cluster.elastic.look({})
        await until(lambda: cluster.up() == [0, 1])

    acted(scene)


def test_who_lives_stays_when_there_are_too_many_and_a_start_is_given_up(acted, tmp_path) -> None:
    async def scene(cluster: Cluster) -> None:
        await until(lambda: cluster.up() == [0, 1, 2])
        bring_up, cluster.bring_up_worker = cluster.bring_up_worker, hanging
        for index in (0, 1):
            cluster.workers[index].ask_to_leave("SIGTERM")
        await until(lambda: {worker.name for worker in starting} == {"rollout-0", "rollout-1"})
        assert cluster.up() == [2]
        rooms = list(cluster.rooms)
        await cluster.elastic.look({"rollout-1": Health(entries=[], waits=[], leaving="SIGTERM")})
        await until(lambda: len(set(cluster.rooms) - set(rooms)) == 1)  # it counts as no death
        wanted_workers.ask_for(tmp_path, 1)
        await cluster.elastic.look({})
        await until(lambda: len(cluster.rooms) == 1)
        assert cluster.up() == [2]
        cluster.bring_up_worker = bring_up
        wanted_workers.ask_for(tmp_path, 2)
        await cluster.elastic.look({})
        await until(lambda: cluster.up() == [0, 2])

    starting = []

    async def hanging(worker: FakeProcess) -> None:
        starting.append(worker)
        await asyncio.Event().wait()

    acted(scene)


def test_a_number_out_of_the_range_is_brought_into_it(acted, tmp_path) -> None:
    async def scene(cluster: Cluster) -> list[int]:
        numbers = []
        for asked in (0, 9):
            wanted_workers.ask_for(tmp_path, asked)
            await cluster.elastic.look({})
            numbers.append(cluster.elastic.num_wanted)
        return numbers

    assert acted(scene) == [1, 3]


def test_one_that_was_sent_sigterm_leaves_and_lives_again_in_another_room(acted) -> None:
    async def scene(cluster: Cluster) -> None:
        await until(lambda: cluster.up() == [0, 1, 2])
        before = list(cluster.rooms)
        reports = {"rollout-1": Health(entries=[], waits=[], leaving="SIGTERM")}
        await cluster.elastic.look(reports)
        await until(lambda: ("lose_worker", 1, "SIGTERM") in cluster.said)
        await until(lambda: cluster.up() == [0, 1, 2])
        assert cluster.processes[1].life == 2
        assert set(cluster.rooms) - set(before)

    acted(scene)


def test_one_that_dies_while_it_is_drained_counts_as_lost(acted) -> None:
    async def scene(cluster: Cluster) -> None:
        await until(lambda: cluster.up() == [0, 1, 2])
        answer = cluster.ask

        async def never_drained(pick: Any, *args: Any) -> int:
            if picked("replay", pick, *args) == "drain_worker":
                cluster.processes[1].died.set()
                await asyncio.Event().wait()
            return await answer(pick, *args)

        cluster.ask = never_drained
        cluster.workers[1].ask_to_leave("SIGTERM")
        await until(lambda: cluster.said)
        assert cluster.said[0] == ("lose_worker", 1, "rollout-1: the process died: killed")

    acted(scene)


def test_one_of_a_range_that_dies_too_often_stays_away_and_the_last_one_ends_the_run(acted) -> None:
    async def scene(cluster: Cluster) -> None:
        await until(lambda: cluster.up() == [0, 1, 2])
        for index in (2, 1):
            cluster.processes[index].died.set()
            await until(lambda index=index: len(cluster.rooms) == index)
        cluster.processes[0].died.set()
        await asyncio.sleep(5)

    with pytest.raises(RunError, match=r"rollout-0: .*killed .*controller.max_restarts is 0"):
        acted(scene)


def test_a_run_without_room_for_any_worker_says_whom_it_waits_for_and_ends(acted, caplog) -> None:
    async def scene(cluster: Cluster) -> None:
        await until(lambda: len(cluster.supervisor.missing) == 2)
        cluster.num_places = 0
        cluster.workers[0].ask_to_leave("Ray drains its node")
        await until(lambda: len(cluster.supervisor.missing) == 3)
        await cluster.elastic.look({})
        assert "no rollout worker is left" in caplog.text
        while True:
            cluster.supervisor.still_s = 99.0
            await cluster.elastic.look({})
            assert cluster.supervisor.still_s == 0, "nobody is taken for hung meanwhile"
            await asyncio.sleep(0.001)

    with pytest.raises(RunError, match=r"empty_s \(0.02 s\): rollout-\d waits for room on Ray \(0.1 CPU\); rollout"):
        acted(scene, num_places=1, empty_s=0.02)
