"""Real runs with several values of `replay.run_ahead`: their accounts, and the table."""

from __future__ import annotations

import pytest

from asyncdapo.accounting.names import WORKER_STATES
from benchmarks.paced.runs import FIXED, NUM_FIRST, Measured, Value, describe, table


def line(step: int, step_s: float, wait_s: float, lease_s: float) -> dict:
    """Of a run whose steps are alike, the first ones apart."""
    return {
        **{f"rollout/time/{state}_s": 0.0 for state in WORKER_STATES},
        "step": step,
        "time/step_s": step_s,
        "controller/wait_s": wait_s,
        "controller/train_s": step_s - wait_s,
        "replay/workers": 1,
        "replay/staleness_mean": 1.5,
        "time/wall_s": 200.0,
        "learner/tokens": 1000.0,
        "learner/cpu_s": 1.0,
        "rollout/time/lease_s": lease_s * step,
        "rollout/time/generate_s": (step_s - lease_s) * step,
    }


def run(step_s: float, engine_s: float = 1.0, learner_s: float = 1.0) -> Measured:
    waited = 1 - learner_s / step_s
    return Measured(9 * step_s, step_s, step_s / 1000, 0.001, learner_s, engine_s, waited, engine_s / step_s, 1.0)


def test_the_first_steps_are_left_out_and_the_rest_is_told_by_the_runs_own_accounts() -> None:
    lines = [line(step, 2.0, 0.5, 0.2) for step in range(NUM_FIRST, 12)]
    first = [line(step, 90.0, 80.0, 0.0) for step in range(NUM_FIRST)]
    measured = Measured.of(first + lines)
    assert measured == pytest.approx((200.0, 2.0, 0.002, 0.001, 1.5, 1.8, 0.25, 0.9, 1.5))


def test_times_are_multiples_of_the_best_fixed_values_in_the_median_of_the_pairs() -> None:
    """The machine is half as fast in the last pair, and once busy with something else."""
    runs = {1.0: [run(1.2), run(1.2), run(2.4)], 2.0: [run(1.0), run(1.0), run(2.0)], 4.0: [run(1.1)] * 3}
    rows = list(table("balanced", {**runs, "auto": [run(1.02), run(9.0), run(2.04)]}))
    for row, multiple in zip(rows, ("1.200", "1.000", "1.100", "1.020"), strict=True):
        assert row.split(" | ")[2:6] == [multiple, multiple, multiple, "1.000"]


def test_auto_is_compared_in_each_seed_with_the_fixed_value_that_is_best_in_the_others() -> None:
    """All values are alike, and each has been lucky once."""
    runs: dict[Value, list[Measured]] = {
        value: [run(0.8 if seed == lucky else 1.0) for seed in range(len(FIXED))] for lucky, value in enumerate(FIXED)
    }
    said = describe("balanced", {**runs, "auto": [run(1.02)] * len(FIXED)})
    assert said.endswith("; auto takes 1.020 of the best fixed value's time for a run, 1.020 for a token")


@pytest.mark.parametrize(
    ("engine_s", "kind"), [(1.5, "engine-bound"), (1.2, None), (1.0, "balanced"), (0.8, None), (0.6, "learner-bound")]
)
def test_a_load_is_said_not_to_be_what_it_is_called(engine_s: float, kind: str | None) -> None:
    runs: dict[Value, list[Measured]] = {value: [run(max(1.0, engine_s), engine_s)] * 3 for value in (*FIXED, "auto")}
    told = {name for name in ("engine-bound", "balanced", "learner-bound") if "NOT" not in describe(name, runs)}
    assert told == ({kind} if kind else set())
