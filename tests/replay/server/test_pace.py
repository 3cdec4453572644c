"""How fast workers are while they have something to do, and who is the slowest."""

from __future__ import annotations

from asyncdapo.replay.server.pace import HEARTBEATS, Pace, spread


def paced(tokens_per_s: float, heartbeats: int = 5, working: float = 1.0) -> Pace:
    pace = Pace()
    for beat in range(heartbeats):
        gauges = {"generate_time_s": beat * working, "lease_time_s": 50.0 * beat, "cpu_s": 9.0 * beat}
        pace.note(gauges | {"tokens": beat * working * tokens_per_s})
    return pace


def test_time_without_a_lease_slows_nobody() -> None:
    assert paced(100.0).tokens_per_s == 100.0


def test_the_slowest_worker_is_named_beside_the_mean() -> None:
    assert spread([(0, paced(100.0)), (1, paced(20.0)), (2, paced(60.0))]) == {
        "rollout/worker_tokens_per_s_mean": 60.0,
        "rollout/worker_tokens_per_s_min": 20.0,
        "rollout/slowest_worker": 1,
    }


def test_a_worker_that_has_hardly_worked_says_nothing() -> None:
    assert spread([(0, paced(100.0, heartbeats=1)), (1, paced(100.0, working=0.1)), (2, Pace())]) == {}


def test_only_the_latest_heartbeats_count() -> None:
    pace = paced(100.0)
    for beat in range(HEARTBEATS):
        pace.note({"generate_time_s": 10.0 + beat, "tokens": 1000.0 + 10 * beat})
    assert pace.tokens_per_s == 10.0
