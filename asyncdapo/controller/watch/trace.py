"""`asyncdapo trace RUN --steps 10:20 -o trace.json`: what all processes did in some steps, for ui.perfetto.dev.

    run
      steps                   step 10 | step 11 | …
    controller, replay, learner, rollout-0, …      a process each
      states                  the time account: one at a time, without gaps
      weights                 versions that it sent, received, loaded
      waits                   whom it waited for, and for what; those at the same time below each other

In: RUN_DIR/spans, of a run that is live, over or resumed. Out: a file of the Trace Event Format, which Perfetto and
chrome://tracing open; microseconds since the first step. Invariant: the spans of one track don't overlap. A step that
was undone and trained again is the second one. Does not own: what the spans are (`accounting/spans`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncdapo.accounting.spans import STATES, Span, Tracks, latest, read
from asyncdapo.errors import UserError

CONTROLLER, STEPS = "controller", "steps"
ORDER = (STEPS, STATES, "weights", "waits")
"""Of tracks."""
Event = dict[str, Any]


def write_trace(run_dir: Path, steps: tuple[int, int] | None, out: Path) -> int:
    """Write the trace of these steps, the first and the last, or of all that are kept. Raises UserError if there are
    none."""
    times = step_times(run_dir)
    if not times:
        raise UserError(f"{run_dir}: has no spans of any step (they are written at the end of each train step)")
    first, last = steps or (min(times), max(times))
    if first not in times or last not in times:
        kept = f"{min(times)}:{max(times)}"
        raise UserError(f"--steps {first}:{last}: the spans that {run_dir} has are of steps {kept}")
    since_s, until_s = times[first].began_s, times[last].ended_s
    if since_s >= until_s:
        raise UserError(f"--steps {first}:{last}: the last step ended before the first one began")
    events = list(trace_events(read(run_dir, since_s, until_s), since_s))
    about = {"run": run_dir.name, "steps": f"{first}:{last}", "since_s": since_s}
    out.write_bytes(msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}))
    num_spans = sum(event["ph"] == "X" for event in events)
    print(f"{out}: steps {first} to {last}, {until_s - since_s:.1f} s, {num_spans:,} spans; open it in ui.perfetto.dev")
    return 0


def step_times(run_dir: Path, most: int = sys.maxsize) -> dict[int, Span]:
    """When each of the latest train steps was, the last time that it was trained."""
    return {int(span.name.rpartition(" ")[2]): span for span in latest(run_dir, CONTROLLER, STEPS, most)}


def trace_events(processes: Mapping[str, Tracks], since_s: float) -> Iterator[Event]:
    """Names of processes and tracks, and their spans."""
    for pid, (process, tracks) in enumerate(processes.items(), start=1):
        yield _name("process_name", process, pid, 0)
        tid = 0
        for track in sorted(tracks, key=ORDER.index):
            for lane in lanes(tracks[track]):
                tid += 1
                yield _name("thread_name", track, pid, tid)
                yield from (_complete(span, track, since_s, pid, tid) for span in lane)


def lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """As few lists as possible of spans that don't overlap, from spans in order of their beginnings."""
    found: list[list[Span]] = []
    for span in spans:
        free = next((lane for lane in found if lane[-1].ended_s <= span.began_s), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def _name(kind: str, name: str, pid: int, tid: int) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _complete(span: Span, track: str, since_s: float, pid: int, tid: int) -> Event:
    began_us, ended_us = (round(1e6 * (at_s - since_s)) for at_s in (span.began_s, span.ended_s))
    times = {"ts": began_us, "dur": ended_us - began_us}
    return {"ph": "X", "name": span.name, "cat": track, **times, "pid": pid, "tid": tid}
