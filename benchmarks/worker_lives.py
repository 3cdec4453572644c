"""Who could sample when, and what a train step had to do with it: from a ledger, and from who was stopped when. And
what its time went into, from the metrics.

In: `leases`, `events` and the ends of train steps of a ledger; when processes of workers were started, and the times in
which some were stopped by SIGSTOP. Out: steps of three kinds, and the times in which nobody could sample.

    alone    for a while nobody could sample, in this step or in the one before: it waits for nobody alive
    moved    a worker left in it, joined, or was being started, and others could sample all the time
    quiet    neither

A worker can sample from the first lease of a life on. All times are seconds since 1970.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEASES = "SELECT worker, session, MIN(granted_at_s) FROM leases GROUP BY worker, session ORDER BY 3"
EVENTS = (
    "SELECT kind, worker, at_s FROM events WHERE kind IN ('worker_joined', 'worker_drained', 'worker_lost')"
    " ORDER BY at_s"
)
ENDS = "SELECT trained_at_s FROM batches WHERE step <= ? ORDER BY step"


@dataclass(frozen=True)
class Span:
    """A time in which a worker could sample, or was stopped."""

    worker: int
    began_s: float
    ended_s: float


@dataclass(frozen=True)
class Step:
    """One train step, from the end of the one before."""

    kind: str
    number: int
    began_s: float
    ended_s: float

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


def parts(step: Step, lines: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Seconds of a step: the whole; what the learner waited for, in all and by cause; for how long it had a core, and
    at least for how long it would have computed and had none. `lines`: of the metrics, by step. What follows a step is
    in its line, and in the time of the next step."""
    own, before = lines[step.number], lines[step.number - 1]
    train_s, cpu_s = own["controller/train_s"], own["learner/cpu_s"]
    waits = {
        "for its batch": own["controller/wait_s"],
        "for a comparison": own["controller/parity_s"],
        "for the publish": before["controller/publish_s"],
        "for a checkpoint": before["controller/checkpoint_s"],
    }
    computing = {"on a core": cpu_s, "without a core": max(0.0, train_s - cpu_s)}
    return {"whole": step.seconds, "waiting": sum(waits.values()), **waits, **computing}


def moves(ledger: sqlite3.Connection, starts: Iterable[tuple[int, float]]) -> list[Span]:
    """From each start of a worker's process to its joining, and the moments in which workers left. `starts`: worker and
    time of each."""
    begun = sorted(starts, key=lambda start: start[1])
    spans = []
    for kind, worker, at_s in ledger.execute(EVENTS):
        before = [start_s for other, start_s in begun if other == worker and start_s < at_s]
        spans.append(Span(worker, before[-1] if kind == "worker_joined" and before else at_s, at_s))
    return spans


def lives(ledger: sqlite3.Connection, end_s: float) -> list[Span]:
    """When each worker could sample, until `end_s`: from its first lease until it was lost, drained or joined anew."""
    events = ledger.execute(EVENTS).fetchall()
    spans = []
    for worker, _, first_s in ledger.execute(LEASES):
        ends = (at_s for _, other, at_s in events if other == worker and at_s > first_s)
        spans.append(Span(worker, first_s, min([*ends, end_s])))
    return [span for span in spans if span.began_s < span.ended_s]


def nobody(ledger: sqlite3.Connection, stopped: Sequence[Span], last_step: int) -> list[Span]:
    """The times between the first and the last of these steps in which no worker could sample."""
    ends = _ends(ledger, last_step)
    return gaps(without(lives(ledger, ends[-1]), stopped), ends[0], ends[-1]) if ends else []


def train_steps(
    ledger: sqlite3.Connection, starts: Iterable[tuple[int, float]], stopped: Sequence[Span], last_step: int
) -> list[Step]:
    """The steps up to `last_step` but the first two, in which PyTorch warms up."""
    ends, empty = _ends(ledger, last_step), nobody(ledger, stopped, last_step)
    moving = moves(ledger, starts)
    steps = []
    for number, (before_s, began_s, ended_s) in enumerate(zip(ends, ends[1:], ends[2:], strict=False), 3):
        if any(gap.began_s < ended_s and gap.ended_s > before_s for gap in empty):
            kind = "alone"
        else:
            kind = "moved" if any(move.began_s <= ended_s and move.ended_s >= began_s for move in moving) else "quiet"
        steps.append(Step(kind, number, began_s, ended_s))
    return steps


def _ends(ledger: sqlite3.Connection, last_step: int) -> list[float]:
    return [at_s for (at_s,) in ledger.execute(ENDS, (last_step,))]


def without(spans: Iterable[Span], stopped: Sequence[Span]) -> list[Span]:
    """What is left of the spans when their workers were stopped for a while."""
    left = list(spans)
    for stop in stopped:
        pieces = []
        for span in left:
            if span.worker != stop.worker:
                pieces.append(span)
                continue
            pieces.append(Span(span.worker, span.began_s, min(span.ended_s, stop.began_s)))
            pieces.append(Span(span.worker, max(span.began_s, stop.ended_s), span.ended_s))
        left = [span for span in pieces if span.began_s < span.ended_s]
    return left


def gaps(spans: Iterable[Span], began_s: float, ended_s: float) -> list[Span]:
    """The parts of this time that no span covers. Their `worker` is -1."""
    found, covered_s = [], began_s
    for span in sorted(spans, key=lambda span: span.began_s):
        if span.began_s > covered_s:
            found.append(Span(-1, covered_s, min(span.began_s, ended_s)))
        covered_s = max(covered_s, span.ended_s)
    if covered_s < ended_s:
        found.append(Span(-1, covered_s, ended_s))
    return [gap for gap in found if gap.began_s < gap.ended_s]
