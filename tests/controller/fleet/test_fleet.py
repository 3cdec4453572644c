"""What a worker's start that fails means for the run. Processes are a few lines here."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from asyncdapo.config.config import Config
from asyncdapo.config.run import ControllerConfig, RunConfig
from asyncdapo.controller.fleet import fleet as fleets
from asyncdapo.controller.fleet.elastic import ElasticWorker
from asyncdapo.controller.fleet.fleet import Fleet, Placed, settle
from asyncdapo.controller.fleet.placement import Bundle
from asyncdapo.controller.fleet.process import Watch
from asyncdapo.controller.fleet.supervisor import Supervisor
from asyncdapo.controller.process.roster import Entry, entry_of
from asyncdapo.controller.roles.actors import start_rollout
from asyncdapo.errors import EngineError, RunError, VerdictError
from asyncdapo.model.config import ModelConfig
from asyncdapo.rollout.config import RolloutConfig
from tests.controller.fakes import picked


class FakeWorker:
    """Its starts fail as told, one after another; `starting` are those that start at the moment."""

    def __init__(self, *starts: Exception | None, name: str = "rollout-0", starting: set[str] | None = None) -> None:
        self.name, self.starts, self.life, self.entry, self.up = name, list(starts), 0, None, asyncio.Event()
        self.starting, self.beside = set() if starting is None else starting, set()

    def spawn(self) -> None:
        self.life += 1

    def end(self) -> None:
        self.up.clear()

    async def identify(self) -> Entry:
        return entry_of("rollout", 0, os.getpid())

    async def start(self, begin, *args) -> None:
        assert begin is start_rollout
        self.starting.add(self.name)
        await asyncio.sleep(0)
        self.beside |= self.starting - {self.name}
        self.starting.remove(self.name)
        if failure := self.starts.pop(0):
            raise failure


class Replay:
    """It is told of lost workers."""

    async def ask(self, pick, *args) -> None:
        assert picked("replay", pick, *args) == "lose_worker"


async def kept(fleet: Fleet, process: FakeWorker) -> None:
    """Its worker, from its first start on."""
    room = SimpleNamespace(bundle=Bundle((process.name,)), node=lambda: "here")
    member = ElasticWorker(
        0,
        process,
        fleet.replay,
        fleet._supervisor,
        fleet,
        drain_s=1.0,
        placement=fleet.placement,
        rooms={process.name: room},
    )
    member.want()
    await member.keep()


def fleet_on(num_gpus: int, run_dir: Path) -> Fleet:
    """Of two workers."""
    config = Config(
        model=ModelConfig(path="none"),
        rollout=RolloutConfig(num_workers=2),
        run=RunConfig(dir=str(run_dir)),
        controller=ControllerConfig(max_restarts=2),
    )
    config, placement = settle(config, [num_gpus], ranks=())
    placed = Placed(config=config, placement=placement, rooms={}, replay=Replay(), ranks=(), workers=())
    return Fleet(Supervisor(config), placed, SimpleNamespace(rollout_address="nowhere"))


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncdapo.controller.fleet.supervisor.end_entries", lambda entries, patience_s: None)
    return fleet_on(0, tmp_path)


FAILURE = EngineError("its memory isn't free yet")


def test_the_first_start_of_a_worker_that_fails_ends_the_run(fleet):
    with pytest.raises(EngineError, match="free yet"):
        asyncio.run(fleet.bring_up_worker(FakeWorker(FAILURE, None)))


def test_a_worker_that_was_up_is_started_again_until_its_budget_is_used_up(fleet):
    async def live_again(*starts) -> FakeWorker:
        worker = FakeWorker(None, *starts)
        await fleet.bring_up_worker(worker)
        worker.up.clear()
        await fleet.bring_up_worker(worker)
        return worker

    worker = asyncio.run(live_again(FAILURE, None))
    assert worker.up.is_set()
    assert worker.life == 3
    with pytest.raises(RunError, match="free yet.*controller.max_restarts is 2"):
        asyncio.run(live_again(FAILURE, FAILURE, FAILURE))


def test_a_worker_whose_reward_function_breaks_its_contract_ends_the_run_and_any_other_lives_again(fleet):
    class Serving(FakeWorker):
        """Ends as told, one life after the other."""

        async def call(self, pick, *args):
            assert picked(self.name, pick, *args) == "serve"
            raise self.ends.pop(0)

    worker = Serving(None, None)
    worker.ends = [FAILURE, VerdictError("score returned -1")]
    with pytest.raises(VerdictError, match="score returned -1"):
        asyncio.run(kept(fleet, worker))
    assert worker.ends == []


@pytest.mark.parametrize(("num_gpus", "at_once"), [(1, False), (3, True)])
def test_engines_start_at_once_unless_they_share_a_gpu(tmp_path, num_gpus, at_once):
    async def main() -> list[FakeWorker]:
        fleet, starting = fleet_on(num_gpus, tmp_path), set()
        workers = [FakeWorker(None, name=name, starting=starting) for name in ("rollout-0", "rollout-1")]
        await asyncio.gather(*map(fleet.bring_up_worker, workers))
        return workers

    assert any(worker.beside for worker in asyncio.run(main())) == at_once


def test_workers_that_join_a_run_start_one_after_another_but_wait_for_none_that_hangs(fleet, monkeypatch):
    monkeypatch.setattr(fleets, "TURN_S", 0.05)
    starting = set()

    class Hanging(FakeWorker):
        async def start(self, begin, *args) -> None:
            starting.add(self.name)
            await asyncio.Event().wait()

    first, second = (FakeWorker(None, name=f"rollout-{number}", starting=starting) for number in (0, 1))

    async def scene() -> None:
        fleet.watch(Watch())
        await asyncio.gather(*map(fleet.bring_up_worker, (first, second)))
        assert not first.beside | second.beside
        hanging = asyncio.ensure_future(fleet.bring_up_worker(Hanging(name="rollout-2")))
        while not starting:
            await asyncio.sleep(0)
        await asyncio.wait_for(fleet.bring_up_worker(third := FakeWorker(None, name="rollout-3", starting=starting)), 5)
        assert third.beside == {"rollout-2"}
        hanging.cancel()
        assert not any(turn.locked() for turn in fleet._turns.values())

    asyncio.run(scene())
