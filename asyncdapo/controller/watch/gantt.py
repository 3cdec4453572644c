"""The time line of the page of `asyncdapo watch --web`: what all processes did in the latest steps.

In: RUN_DIR/spans. Out: a row for each process with bars of its states, and one for each that has versions to send or to
load; when each step began. A process may have changed its state a thousand times in that: a bar is at least a
`NUM_PLACES`th of the time, of the state that had most of it. Does not own: how it is drawn (page.js).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from asyncdapo.accounting.spans import STATES, Span, read
from asyncdapo.controller.watch.trace import step_times

NUM_STEPS = 5
NUM_PLACES = 250
TRACKS = {STATES: "", "weights": ", weights"}
"""Those that are shown, with what stands behind the name of the process."""


def gantt(run_dir: Path) -> dict[str, Any]:
    """Rows and steps; seconds since the first of these steps began. No rows while no step is over."""
    steps = sorted(step_times(run_dir, NUM_STEPS).items())
    if not steps:
        return {"steps": [], "rows": []}
    since_s, until_s = min(span.began_s for _, span in steps), max(span.ended_s for _, span in steps)
    place_s = (until_s - since_s) / NUM_PLACES
    return {
        "steps": [[step, span.began_s - since_s] for step, span in steps],
        "rows": [
            {
                "name": f"{process}{behind}",
                "bars": [[span.name, span.began_s - since_s, span.ended_s - since_s] for span in spans],
            }
            for process, tracks in read(run_dir, since_s, until_s).items()
            for track, behind in TRACKS.items()
            if (spans := list(coarse(tracks.get(track, []), since_s, place_s)))
        ],
    }


def coarse(spans: Sequence[Span], since_s: float, place_s: float) -> Iterator[Span]:
    """The states that had most of each place; none where nothing was done. Neighbours of one state are one span."""
    shares: dict[int, defaultdict[str, float]] = {}
    for span in spans:
        place, last = (int((at_s - since_s) / place_s) for at_s in (span.began_s, span.ended_s))
        for each in range(place, min(last, NUM_PLACES - 1) + 1):
            begins_s = since_s + each * place_s
            part_s = min(span.ended_s, begins_s + place_s) - max(span.began_s, begins_s)
            if part_s > 0:
                shares.setdefault(each, defaultdict(float))[span.name] += part_s
    states = ((place, max(share, key=lambda name: share[name])) for place, share in sorted(shares.items()))
    runs = groupby(enumerate(states), key=lambda one: (one[1][0] - one[0], one[1][1]))
    for (_, name), run in runs:
        places = [place for _, (place, _) in run]
        yield Span(name, since_s + places[0] * place_s, since_s + (places[-1] + 1) * place_s)
