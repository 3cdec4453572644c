"""Runs in which anything may go wrong, each from a seed: processes die at any step, messages get lost, links are cut.

Every run ends with all going well, must come to its end, and is judged by `judge.py`. A seed that fails is run again by
the command in the failure's message. `SIMULATION_SEED` begins elsewhere: nightly runs have seeds of their own.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.world import simulate

FIRST = int(os.environ.get("SIMULATION_SEED", "0"))
NUM_TESTS, NUM_SEEDS = 2, 90
"""180 runs: about eight seconds on one core."""
NUM_ON_FILES = 10
SOAK = 200
"""A soak has so many times as many runs."""


@pytest.fixture(autouse=True)
def _collected_by_hand() -> Iterator[None]:
    """The collector would walk through all modules again and again; what a test leaves behind is small."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def run_all(seeds: range, *, files: bool = False) -> Counter[str]:
    """Simulate every seed. Fails with those that are broken, and how to see them again."""
    counts: Counter[str] = Counter()
    broken: list[str] = []
    for seed in seeds:
        try:
            counts.update(simulate(seed, files=files).counts)
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed is what a person needs
            command = f"python -m tests.simulation.run --seed {seed} --trace" + " --files" * files
            line = traceback.extract_tb(error.__traceback__)[-1].line
            broken.append(f"{type(error).__name__}: {str(error) or line}\n    {command}")
    assert not broken, f"{len(broken)} of {len(seeds)} runs from seed {seeds[0]} on:\n" + "\n".join(broken[:5])
    return counts


def block(number: int) -> range:
    return range(FIRST + number * NUM_SEEDS, FIRST + (number + 1) * NUM_SEEDS)


@pytest.mark.parametrize("number", range(NUM_TESTS))
def test_whatever_goes_wrong_the_run_comes_to_a_sound_end(number: int) -> None:
    counts = run_all(block(number))
    for role in ("replay", "rollout", "learner", "controller"):
        assert counts[f"{role} deaths"] >= NUM_SEEDS / 10, f"hardly any death of {role}: {counts}"
    assert counts["rollbacks"] >= NUM_SEEDS / 5
    assert counts["reloads"] >= NUM_SEEDS / 10
    assert counts["batches with copies"] >= NUM_SEEDS / 10
    assert counts["early batches"] >= NUM_SEEDS / 10
    assert counts["leaves"] >= NUM_SEEDS / 5
    assert counts["saves"] >= NUM_SEEDS / 4
    assert counts["continued leases"] >= NUM_SEEDS / 12
    assert counts["unreadable batches"] >= NUM_SEEDS / 100


def test_on_real_files_too() -> None:
    counts = run_all(range(FIRST, FIRST + NUM_ON_FILES), files=True)
    assert counts["rollbacks"]
    assert counts["reloads"]


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", range(NUM_TESTS, SOAK * NUM_TESTS))
def test_many_more_seeds(number: int) -> None:
    run_all(block(number))


def test_a_seed_always_gives_the_same_run() -> None:
    for seed in range(FIRST, FIRST + 10):
        first, second = simulate(seed, trace=True), simulate(seed, trace=True)
        assert first.trace == second.trace
        assert first.trace
