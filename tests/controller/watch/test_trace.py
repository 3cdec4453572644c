"""The trace of a run: a file that Perfetto opens, whose spans are the time accounts."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.accounting.spans import STATES, Span, SpanFile, read
from asyncdapo.controller.watch.gantt import NUM_PLACES, NUM_STEPS, coarse, gantt
from asyncdapo.controller.watch.trace import lanes, step_times, write_trace
from asyncdapo.errors import UserError

NUM_DONE = 8
STEP_S = 2.0
NUM_CHANGES = 600


def run_with_spans(run_dir: Path) -> Path:
    """Steps of 2 s: the controller waits and trains, replay changes its state 600 times, a worker waits twice."""
    began_s = time.monotonic()
    controller, replay, worker = (SpanFile(run_dir, name) for name in ("controller", "replay", "rollout-0"))
    for step in range(1, NUM_DONE + 1):
        now_s = began_s + STEP_S * (step - 1)
        controller.write(
            steps=[Span(f"step {step}", now_s, now_s + STEP_S)],
            states=[Span("wait", now_s, now_s + 0.5), Span("train", now_s + 0.5, now_s + STEP_S)],
            weights=[Span(f"version {step}", now_s + 1.9, now_s + STEP_S)],
        )
        piece_s = STEP_S / NUM_CHANGES
        replay.write(
            states=[
                Span("idle" if place % 2 else "workers", now_s + place * piece_s, now_s + (place + 1) * piece_s)
                for place in range(NUM_CHANGES)
            ]
        )
        worker.write(
            states=[Span("generate", now_s, now_s + STEP_S)],
            waits=[Span("learner: a", now_s, now_s + 1.0), Span("learner: b", now_s + 0.5, now_s + 1.5)],
        )
    return run_dir


def events_of(run_dir: Path, steps: tuple[int, int] | None) -> list[dict]:
    out = run_dir / "trace.json"
    assert write_trace(run_dir, steps, out) == 0
    return json.loads(out.read_text())["traceEvents"]


def test_a_trace_has_the_fields_of_the_format_and_tracks_without_overlap(tmp_path: Path) -> None:
    events = events_of(run_with_spans(tmp_path), (2, 3))
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {names[event["pid"], 0] for event in spans} == {"controller", "replay", "rollout-0"}
    tracks: dict[tuple[int, int], list[dict]] = {}
    for event in spans:
        assert {"name", "cat", "ts", "dur", "pid", "tid"} < event.keys()
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert names[event["pid"], event["tid"]] == event["cat"]
        tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for track in tracks.values():
        assert all(before["ts"] + before["dur"] <= after["ts"] for before, after in pairwise(track))
    assert sorted(names[track] for track in tracks) == sorted(["steps", "weights", "waits", "waits", *[STATES] * 3])


def test_states_of_a_trace_sum_to_the_steps(tmp_path: Path) -> None:
    events = events_of(run_with_spans(tmp_path), (2, 4))
    for pid in (1, 2, 3):
        whole = sum(event["dur"] for event in events if event["pid"] == pid and event.get("cat") == STATES)
        assert whole == pytest.approx(3 * STEP_S * 1e6, abs=5)
    trained = sum(event["dur"] for event in events if event["name"] == "train")
    assert trained == pytest.approx(3 * 1.5e6, abs=5)


def test_without_steps_a_trace_has_all_that_are_kept(tmp_path: Path) -> None:
    events = events_of(run_with_spans(tmp_path), None)
    assert sum(event.get("cat") == "steps" for event in events) == NUM_DONE


def test_a_step_that_was_trained_again_is_the_second_one(tmp_path: Path) -> None:
    run_with_spans(tmp_path)
    now_s = time.monotonic() + 100
    SpanFile(tmp_path, "controller").write(steps=[Span("step 8", now_s, now_s + 1)])
    times = step_times(tmp_path)
    assert times[8].began_s - times[7].ended_s > 80


def test_steps_without_spans_are_refused_with_those_that_have_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no spans of any step"):
        write_trace(tmp_path, None, tmp_path / "trace.json")
    run_with_spans(tmp_path)
    with pytest.raises(UserError, match=r"--steps 3:9: .* of steps 1:8"):
        write_trace(tmp_path, (3, 9), tmp_path / "trace.json")


spans_strategy = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=30)


@given(spans_strategy)
def test_lanes_hold_every_span_once_and_none_that_overlap(places: list) -> None:
    spans = [Span("a", float(began), float(began + length)) for began, length in sorted(places)]
    found = lanes(spans)
    assert sorted(span for lane in found for span in lane) == sorted(spans)
    for lane in found:
        assert all(before.ended_s <= after.began_s for before, after in pairwise(lane))
    most = max((sum(a.began_s <= span.began_s < a.ended_s for a in spans) for span in spans), default=0)
    assert len(found) == most


def test_a_time_line_has_a_bounded_number_of_bars_whatever_was_recorded(tmp_path: Path) -> None:
    shown = gantt(run_with_spans(tmp_path))
    assert [step for step, _ in shown["steps"]] == list(range(NUM_DONE - NUM_STEPS + 1, NUM_DONE + 1))
    rows = {row["name"]: row["bars"] for row in shown["rows"]}
    assert set(rows) == {"controller", "controller, weights", "replay", "rollout-0"}
    assert all(0 < len(bars) <= NUM_PLACES for bars in rows.values())
    assert [name for name, _, _ in rows["rollout-0"]] == ["generate"]
    assert [name for name, _, _ in rows["controller"]] == ["wait", "train"] * NUM_STEPS
    recorded = read(tmp_path, 0, time.time() + 1000)["replay"][STATES]
    assert len(recorded) == NUM_CHANGES * NUM_DONE


def test_a_place_belongs_to_the_state_that_had_most_of_it() -> None:
    spans = [Span("a", 0.0, 0.4), Span("b", 0.4, 2.0), Span("c", 5.0, 6.0)]
    assert list(coarse(spans, 0.0, 1.0)) == [Span("b", 0.0, 2.0), Span("c", 5.0, 6.0)]


def test_a_run_without_spans_has_an_empty_time_line(tmp_path: Path) -> None:
    assert gantt(tmp_path) == {"steps": [], "rows": []}
