"""What a process did when: as many spans as there is room for, in files that a kill may cut off anywhere."""

from __future__ import annotations

import math
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.accounting.clock import StateClock
from asyncdapo.accounting.spans import FOLDER, NOT_KEPT, STATES, Span, SpanFile, SpanRing, latest, read, read_process


def spans_of(run_dir: Path, process: str = "replay") -> list[Span]:
    return read_process(run_dir, process, -math.inf, math.inf).get(STATES, [])


def at(now_s: float, *names: str) -> list[Span]:
    """One each tenth of a second from then on."""
    return [Span(name, now_s + 0.1 * place, now_s + 0.1 * (place + 1)) for place, name in enumerate(names)]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.booleans())), st.integers(1, 5))
def test_spans_of_a_clock_follow_each_other_and_sum_to_its_account(moves: list, seconds: int) -> None:
    now = [100.0]
    clock = StateClock(lambda: now[0])
    taken: list[Span] = []
    for state, passed_s, takes in moves:
        clock.enter(state)
        now[0] += passed_s
        if takes:
            taken += clock.take_spans()
    now[0] += seconds
    taken += clock.take_spans()
    assert all(before.ended_s == after.began_s for before, after in zip(taken, taken[1:], strict=False))
    for state, total_s in clock.totals().items():
        assert sum(span.ended_s - span.began_s for span in taken if span.name == state) == total_s


def test_a_ring_keeps_the_newest_and_says_when_the_others_were() -> None:
    ring = SpanRing(most=2)
    first, second, third, fourth = at(5, *"abcd")
    for span in (first, second, third, fourth):
        ring.add(span)
    assert ring.take() == [Span(NOT_KEPT, first.began_s, second.ended_s), third, fourth]
    assert ring.take() == []


def test_what_is_written_is_read_in_time_of_day_and_cut_to_what_was_asked_for(tmp_path: Path) -> None:
    now_s = time.monotonic()
    epoch_s = time.time() - now_s
    file = SpanFile(tmp_path, "replay")
    file.write(states=at(now_s, "idle", "workers"), waits=[])
    file.write(states=at(now_s + 0.2, "idle", "learner"))
    spans = spans_of(tmp_path)
    assert [span.name for span in spans] == ["idle", "workers", "idle", "learner"]
    assert all(before.ended_s == after.began_s for before, after in zip(spans, spans[1:], strict=False))
    assert abs(spans[0].began_s - (epoch_s + now_s)) < 0.01
    middle = read(tmp_path, spans[1].began_s + 0.05, spans[2].began_s + 0.05)
    assert list(middle) == ["replay"]
    assert [(span.name, round(span.ended_s - span.began_s, 3)) for span in middle["replay"][STATES]] == [
        ("workers", 0.05),
        ("idle", 0.05),
    ]


def test_a_line_that_a_kill_cut_off_costs_nothing_but_itself(tmp_path: Path) -> None:
    SpanFile(tmp_path, "replay").write(states=at(1, "idle"))
    path = tmp_path / FOLDER / "replay.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    SpanFile(tmp_path, "replay").write(states=at(9, "workers"))
    assert [span.name for span in spans_of(tmp_path)] == ["idle", "workers"]


def test_the_files_of_a_process_stay_below_twice_their_bound(tmp_path: Path) -> None:
    file = SpanFile(tmp_path, "replay", most_bytes=1000)
    for place in range(105):
        file.write(states=at(place, f"state {place}"))
    sizes = [path.stat().st_size for path in (tmp_path / FOLDER).iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) < 2 * 1100
    assert spans_of(tmp_path)[-1].name == "state 104"
    assert len(spans_of(tmp_path)) > 10


def test_the_latest_spans_of_a_track_are_read_from_the_end(tmp_path: Path) -> None:
    file = SpanFile(tmp_path, "controller", most_bytes=400)
    for place in range(20):
        file.write(steps=at(place, f"step {place}"), states=at(place, "wait", "train"))
    assert [span.name for span in latest(tmp_path, "controller", "steps", 3)] == ["step 17", "step 18", "step 19"]
    assert [span.name for span in latest(tmp_path, "controller", STATES, 3)] == ["train", "wait", "train"]
    assert latest(tmp_path, "learner", "steps", 3) == []


def test_nothing_is_written_of_nothing(tmp_path: Path) -> None:
    SpanFile(tmp_path, "replay").write(states=[], waits=[])
    assert read(tmp_path, -math.inf, math.inf) == {}
