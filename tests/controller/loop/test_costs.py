"""What tokens cost, by what became of them; and what only all ranks of the learner show."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.controller.fleet.placement import Bundle, Placement
from asyncdapo.controller.loop.costs import CLASSES, Costs
from asyncdapo.controller.loop.rank_metrics import of_ranks

SHARED = Placement(
    (Bundle(("learner", "rollout-0", "rollout-1"), 1), Bundle(("rollout-2",), 2), Bundle(("replay",))), ""
)
ALL = ("learner", "rollout-0", "rollout-1", "rollout-2")
ON_CPUS = Placement((Bundle(("learner", "rollout-0", "replay")),), "")


def replay(cpu_s: float = 60.0, **tokens: float) -> dict[str, float]:
    counts = dict.fromkeys(CLASSES, 0.0) | tokens
    return {f"replay/tokens_{each}": number for each, number in counts.items()} | {"rollout/cpu_s": cpu_s}


def test_gpu_seconds_are_wall_time_times_what_a_role_holds_and_go_on_after_a_resume() -> None:
    now = [10.0]
    costs = Costs(SHARED, {"rollout/gpu_s": 7.0}, lambda: now[0])
    now[0] += 30.0
    costs.metrics(replay(trained=1.0), ALL)
    now[0] += 10.0
    metrics = costs.metrics(replay(trained=1.0), ("learner", "rollout-0"))
    assert metrics["rollout/gpu_s"] == pytest.approx(7 + 30 * (2 + 2 / 3) + 10 / 3)
    assert metrics["learner/gpu_s"] == pytest.approx(40 / 3)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10**9), min_size=len(CLASSES), max_size=len(CLASSES)), st.floats(0.1, 1e6))
def test_classes_sum_to_the_whole_in_proportion_to_their_tokens(counts: list[int], cpu_s: float) -> None:
    now = [0.0]
    costs = Costs(SHARED, {}, lambda: now[0])
    now[0] = 50.0
    tokens = dict(zip(CLASSES, map(float, counts), strict=True))
    metrics = costs.metrics(replay(cpu_s, **tokens), ALL)
    for whole in ("rollout/cpu_s", "rollout/gpu_s"):
        parts = [metrics[f"{whole}_{each}"] for each in CLASSES]
        seconds = cpu_s if whole == "rollout/cpu_s" else metrics[whole]
        assert sum(parts) == pytest.approx(seconds if any(counts) else 0.0)
        expected = [seconds * number / (sum(counts) or 1) for number in counts]
        assert parts == pytest.approx(expected)


def test_on_cpus_there_are_no_gpu_seconds() -> None:
    metrics = Costs(ON_CPUS, {}).metrics(replay(trained=3.0, filtered=1.0), ("learner", "rollout-0"))
    assert (metrics["rollout/gpu_s"], metrics["learner/gpu_s"], metrics["rollout/cpu_s_trained"]) == (0, 0, 45)
    assert not any(name.startswith("rollout/gpu_s_") for name in metrics)


def test_of_several_ranks_the_slowest_is_named_and_of_one_nothing_is_added() -> None:
    first, second = (
        {"learner/time/gradient_s": gradient_s, "learner/cpu_s": 4.0, "learner/peak_gib": gradient_s / 2}
        for gradient_s in (2.0, 6.0)
    )
    assert of_ranks([first]) == first
    assert of_ranks([first, second]) == first | {
        "learner/rank_gradient_mean_s": 4.0,
        "learner/rank_gradient_max_s": 6.0,
        "learner/slowest_rank": 1,
        "learner/rank_peak_gib_max": 3.0,
        "learner/ranks_cpu_s": 8.0,
    }
