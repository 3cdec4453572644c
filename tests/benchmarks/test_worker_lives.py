"""Whose absence a step is blamed on."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.worker_lives import Span, Step, gaps, lives, nobody, parts, train_steps, without

ENDS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0)


@pytest.fixture
def ledger() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as made:
        made.execute("CREATE TABLE leases (worker, session, granted_at_s)")
        made.execute("CREATE TABLE events (kind, worker, at_s)")
        made.execute("CREATE TABLE batches (step, trained_at_s)")
        made.executemany("INSERT INTO batches VALUES (?, ?)", enumerate(ENDS, 1))
        yield made


def lived(
    ledger: sqlite3.Connection, worker: int, session: str, first_s: float, *, end: str = "", at_s: float = 0
) -> None:
    """A life that joins, has two leases, and ends so if it ends."""
    ledger.execute("INSERT INTO events VALUES ('worker_joined', ?, ?)", (worker, first_s - 0.5))
    for granted_s in (first_s, first_s + 1):
        ledger.execute("INSERT INTO leases VALUES (?, ?, ?)", (worker, session, granted_s))
    if end:
        ledger.execute("INSERT INTO events VALUES (?, ?, ?)", (end, worker, at_s))


def kinds(ledger: sqlite3.Connection, *stopped: Span) -> list[str]:
    return [step.kind for step in train_steps(ledger, [(1, 6.0), (1, 11.0)], stopped, last_step=len(ENDS))]


def test_steps_have_the_numbers_of_the_ledger(ledger) -> None:
    lived(ledger, 0, "a", -10.0)
    steps = train_steps(ledger, [], [], last_step=len(ENDS))
    assert [(step.number, step.ended_s) for step in steps] == list(enumerate(ENDS, 1))[2:]


def test_a_step_in_which_one_of_two_leaves_has_moved_and_the_others_are_quiet(ledger) -> None:
    lived(ledger, 0, "a", -10.0)
    lived(ledger, 1, "b", -10.0, end="worker_drained", at_s=12.0)
    assert kinds(ledger) == ["quiet", "moved", "quiet", "quiet", "quiet"]


def test_the_steps_in_which_one_is_being_started_and_joins_have_moved(ledger) -> None:
    lived(ledger, 0, "a", -10.0)
    lived(ledger, 1, "b", 22.0)
    assert kinds(ledger) == ["quiet", "moved", "moved", "moved", "quiet"]


def test_the_step_in_which_nobody_could_sample_and_the_next_one_wait_for_nobody_alive(ledger) -> None:
    lived(ledger, 0, "a", -10.0, end="worker_lost", at_s=11.0)
    lived(ledger, 0, "b", 14.0)
    assert kinds(ledger) == ["quiet", "alone", "alone", "quiet", "quiet"]
    assert nobody(ledger, [], len(ENDS)) == [Span(-1, 11.0, 14.0)]


def test_a_step_waits_for_what_followed_the_one_before_and_for_its_own_batch() -> None:
    def line(**own: float) -> dict[str, float]:
        names = "train", "wait", "parity", "publish", "checkpoint"
        return {f"controller/{name}_s": own.get(name, 0.0) for name in names} | {"learner/cpu_s": own.get("cpu", 0.0)}

    lines = {2: line(publish=0.5, checkpoint=0.25, wait=9.0), 3: line(train=4.0, cpu=1.0, wait=0.25, publish=9.0)}
    found = parts(Step("moved", 3, 100.0, 105.0), lines)
    assert (found["whole"], found["waiting"], found["on a core"], found["without a core"]) == (5.0, 1.0, 1.0, 3.0)
    assert sum(found[cause] for cause in found if cause.startswith("for ")) == found["waiting"]


def test_one_that_is_stopped_can_not_sample(ledger) -> None:
    lived(ledger, 0, "a", -10.0)
    assert kinds(ledger, Span(0, 16.0, 18.0)) == ["quiet", "quiet", "alone", "alone", "quiet"]
    assert kinds(ledger, Span(1, 16.0, 18.0)) == ["quiet"] * 5


def test_a_life_without_an_end_in_the_ledger_ends_when_the_worker_joins_anew(ledger) -> None:
    lived(ledger, 0, "a", -10.0)
    lived(ledger, 0, "b", 9.0)
    assert lives(ledger, 30.0) == [Span(0, -10.0, 8.5), Span(0, 9.0, 30.0)]


times = st.lists(st.integers(0, 20).map(float), min_size=2, max_size=2, unique=True)
spans = st.lists(st.builds(lambda worker, ends: Span(worker, *sorted(ends)), st.integers(0, 2), times))


@given(spans, spans)
def test_each_moment_is_in_a_gap_exactly_if_nobody_lives_who_is_not_stopped(living, stopped) -> None:
    empty = gaps(without(living, stopped), 0.0, 20.0)
    for moment in (second + 0.5 for second in range(20)):

        def within(some: list[Span], worker: int | None = None, moment: float = moment) -> bool:
            mine = [span for span in some if worker in (None, span.worker)]
            return any(span.began_s < moment < span.ended_s for span in mine)

        someone = any(within(living, worker) and not within(stopped, worker) for worker in range(3))
        assert within(empty) != someone
