"""How fast workers are while they have something to do, and who is the slowest."""

from __future__ import annotations

import math

import pytest

from asyncdapo.replay.server.pace import HEARTBEATS, MOST_HEARTBEATS, Pace, relative, spread


def paced(tokens_per_s: float, heartbeats: int = 5, working: float = 1.0, sequences: float = 4.0) -> Pace:
    pace = Pace()
    for beat in range(heartbeats):
        gauges = {"generate_time_s": beat * working, "lease_time_s": 50.0 * beat, "cpu_s": 9.0 * beat}
        busy = {
            "running_s": sequences * beat * working,
            "waiting_s": 2.0 * beat * working,
            "kv_use": tokens_per_s / 200,
        }
        pace.note(gauges | busy | {"tokens": beat * working * tokens_per_s})
    return pace


def test_time_without_a_lease_slows_nobody() -> None:
    assert paced(100.0).tokens_per_s == 100.0


def test_the_slowest_worker_is_named_beside_the_mean() -> None:
    assert spread([(0, paced(100.0)), (1, paced(20.0)), (2, paced(60.0))]) == {
        "rollout/worker_tokens_per_s_mean": 60.0,
        "rollout/worker_tokens_per_s_min": 20.0,
        "rollout/slowest_worker": 1,
        "rollout/worker_running_mean": 4.0,
        "rollout/worker_running_min": 4.0,
        "rollout/worker_waiting_mean": 2.0,
        "rollout/worker_waiting_max": 2.0,
        "rollout/worker_kv_use_mean": pytest.approx(0.3),
        "rollout/worker_kv_use_max": 0.5,
    }


def test_an_engine_that_says_nothing_of_its_kv_cache_has_no_number() -> None:
    pace = Pace()
    for beat in range(3):
        pace.note({"generate_time_s": beat, "tokens": beat, "running_s": beat})
    assert not any("kv_use" in name for name in spread([(0, pace)]))


def test_a_worker_that_has_hardly_worked_says_nothing() -> None:
    found = spread([(0, paced(100.0, heartbeats=1)), (1, paced(100.0, working=0.1)), (2, Pace())])
    assert set(found) == {"rollout/worker_kv_use_mean", "rollout/worker_kv_use_max"}


def test_only_the_latest_heartbeats_count() -> None:
    pace = paced(100.0)
    for beat in range(HEARTBEATS):
        pace.note({"generate_time_s": 10.0 + beat, "tokens": 1000.0 + 10 * beat})
    assert pace.tokens_per_s == 10.0


def test_a_worker_that_mostly_waits_is_known_by_what_little_it_did() -> None:
    """Ten heartbeats of 0.1 s of work each are too little, so more of them count."""
    assert math.isnan(paced(100.0, heartbeats=HEARTBEATS, working=0.1).tokens_per_s)
    assert paced(100.0, heartbeats=3 * HEARTBEATS, working=0.1).tokens_per_s == pytest.approx(100.0)
    assert math.isnan(paced(100.0, heartbeats=9 * MOST_HEARTBEATS, working=0.001).tokens_per_s)


def test_the_speed_of_a_sequence_tells_a_slow_worker_from_one_with_few_leases() -> None:
    full, half, slow = paced(100.0, sequences=10), paced(50.0, sequences=5), paced(40.0, sequences=10)
    assert relative([full, half, slow]) == [1.25, 1.25, 0.5]
    assert relative([Pace()]) == relative([Pace(), full])[:1] == [1.0]
