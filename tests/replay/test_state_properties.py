"""Whatever happens, in whatever order: after every event all invariants of replay hold, by an account of their own."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from tests.replay.simulation import Simulation, World

CHAOS = st.binary(min_size=150, max_size=700)


@st.composite
def worlds(draw: st.DrawFn, run_aheads=(0.0, 0.25, 0.5, 1.0, 1.3, 2.0, "auto")) -> World:
    run_ahead = draw(st.sampled_from(run_aheads))
    return World(
        replay=ReplayConfig(
            prompts_per_step=draw(st.integers(1, 4)),
            run_ahead=run_ahead,
            max_staleness=(1 if run_ahead == "auto" else math.ceil(run_ahead)) + draw(st.integers(0, 2)),
            on_stale=draw(st.sampled_from(["auto", "drop", "requeue", "wait"])),
        ),
        filter=FilterConfig(
            enabled=draw(st.sampled_from([True, True, True, False])),
            mode=draw(st.sampled_from(["filter", "replace"])),
            max_gen_batches=draw(st.sampled_from([0, -1, 1, 2])),
            gen_batch_multiplier=draw(st.integers(1, 2)),
            on_limit=draw(st.sampled_from(["partial", "unfiltered", "partial", "unfiltered", "raise"])),
        ),
        max_attempts=draw(st.integers(1, 3)),
        num_prompts=draw(st.sampled_from([None, None, None, 0, 9, 30])),
        num_workers=draw(st.integers(1, 3)),
        num_slots=draw(st.integers(1, 6)),
        learner_pace=draw(st.sampled_from([1, 3, 8])),
        rollout_pace=draw(st.sampled_from([1, 3, 8])),
    )


def chaos(max_examples: int):
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck))


@chaos(250)
@given(worlds(), CHAOS)
def test_all_invariants_hold_after_every_event(world: World, choices: bytes) -> None:
    Simulation(world).run(choices)


@chaos(150)
@given(worlds(), CHAOS)
def test_after_any_trouble_the_next_batches_come_once_all_goes_well(world: World, choices: bytes) -> None:
    simulation = Simulation(world)
    simulation.run(choices)
    simulation.settle(num_batches=3)


@chaos(60)
@given(worlds(), CHAOS)
def test_at_the_end_of_the_run_every_prompt_has_an_end(world: World, choices: bytes) -> None:
    simulation = Simulation(world)
    simulation.run(choices)
    if simulation.truth.over:
        simulation.finish_all()
    simulation.tell(core.RunEnded())
    assert not simulation.truth.leases
    assert set(simulation.truth.prompts.values()) <= {"trained", "filtered", "expired", "failed", "unused"}
    for echo in simulation.echoes:
        simulation.tell(echo)


@chaos(40)
@given(worlds(), CHAOS)
def test_the_same_events_give_the_same_actions(world: World, choices: bytes) -> None:
    first, second = Simulation(world), Simulation(world)
    first.run(choices)
    second.run(choices)
    assert first.log == second.log
