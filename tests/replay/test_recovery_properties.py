"""Whenever the server dies or the run goes back to a checkpoint: the state is what it was, or what it must be."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given

from asyncdapo.replay.core import events as core
from tests.replay.restarts import Restarts, snapshot
from tests.replay.simulation import World
from tests.replay.test_state_properties import CHAOS, chaos, worlds

SHM = Path("/dev/shm")


@contextmanager
def restarts(world: World) -> Iterator[Restarts]:
    """In a run directory of its own, which outlives no example; in memory where there is such a place."""
    folder = Path(tempfile.mkdtemp(prefix="restarts-", dir=SHM if SHM.is_dir() else None))
    simulation = Restarts(world, folder)
    try:
        yield simulation
    finally:
        simulation.journal.close()
        shutil.rmtree(folder)


@chaos(40)
@given(worlds(), CHAOS)
def test_a_reload_gives_the_state_that_was_and_a_rollback_the_one_that_must_be(world: World, choices: bytes) -> None:
    with restarts(world) as simulation:
        simulation.run(choices)
        simulation.check_ledger()


@chaos(25)
@given(worlds(), CHAOS)
def test_after_a_rollback_the_next_batches_come_once_all_goes_well(world: World, choices: bytes) -> None:
    with restarts(world) as simulation:
        simulation.run(choices)
        simulation.roll_back(max(0, simulation.num_trained - 1))
        simulation.settle(num_batches=2)
        simulation.check_ledger()


@chaos(20)
@given(worlds(), CHAOS)
def test_a_second_rollback_to_the_same_step_gives_the_same_state(world: World, choices: bytes) -> None:
    with restarts(world) as simulation:
        simulation.run(choices)
        step = max(0, simulation.num_trained - 1)
        simulation.roll_back(step)
        once = snapshot(simulation.state)
        simulation.roll_back(step)
        assert snapshot(simulation.state) == once


@chaos(25)
@given(worlds(), CHAOS)
def test_a_run_that_has_ended_can_be_extended(world: World, choices: bytes) -> None:
    with restarts(world) as simulation:
        simulation.run(choices)
        simulation.tell(core.RunEnded())
        simulation.reload()
        simulation.roll_back(simulation.num_trained)
        simulation.settle(num_batches=1)
        simulation.check_ledger()
