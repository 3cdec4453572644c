"""The verdict while a run goes on, and at its end.

In: the line of each train step, in order. Out: `verdict/…` metrics of the latest `NUM_STEPS` steps, and a sentence when
the verdict is another one and has stood for `STEADY` steps: a step more or less says little. At the end a paragraph on
all steps. Does not own: how the verdict is found (`verdict`), what to change (`advice`), where it is shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

from asyncdapo.metrics.verdict.advice import Keys, words
from asyncdapo.metrics.verdict.verdict import BALANCED, LIMITS, Verdict, judge, lost_shares
from asyncdapo.metrics.verdict.window import Line, Window

NUM_STEPS = 12
MIN_STEPS = 3
STEADY = 3


class RunningVerdict:
    """Of one launch."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._lines: deque[Line] = deque(maxlen=NUM_STEPS + 1)
        self._said = BALANCED
        self._latest: deque[str] = deque(maxlen=STEADY)

    def begin(self) -> None:
        """The next line doesn't follow those before: the run goes back, or begins."""
        self._lines.clear()

    def add(self, line: Line) -> tuple[dict[str, float], list[str]]:
        """The metrics of this step, and what there is to say; both empty while little is known."""
        self._lines.append(line)
        window = Window.of(list(self._lines))
        if window is None or window.num_steps < MIN_STEPS:
            return {}, []
        lost = lost_shares(window)
        verdict = judge(lost)
        return metrics_of(window, lost), self._news(verdict, window)

    def _news(self, verdict: Verdict, window: Window) -> list[str]:
        self._latest.append(verdict.limit)
        if verdict.limit == self._said or self._latest.count(verdict.limit) < STEADY:
            return []
        self._said = verdict.limit
        return [f"verdict: {line}" for line in words(verdict, window, self._keys)]


def metrics_of(window: Window, lost: Mapping[str, float]) -> dict[str, float]:
    """What a line has of the verdict."""
    return {f"verdict/{limit}_ratio": share for limit, share in lost.items()} | {
        "verdict/overlap_ratio": window.overlap
    }


def verdict_of(line: Line) -> Verdict | None:
    """The verdict that a line holds; None where little was known."""
    lost = {limit: line[name] for limit in LIMITS if (name := f"verdict/{limit}_ratio") in line}
    return judge(lost) if len(lost) == len(LIMITS) else None


def latest_words(lines: Sequence[Line], keys: Keys) -> str:
    """The verdict that the newest line holds, with advice; empty where it holds none. The first lines of a launch have
    none, so those before them, whose counts may have ended differently, are left out."""
    verdict = verdict_of(lines[-1]) if lines else None
    if verdict is None:
        return ""
    judged = sum(1 for _ in takewhile(verdict_of, reversed(lines[-NUM_STEPS:])))
    window = Window.of(lines[-min(judged + MIN_STEPS, NUM_STEPS + 1) :])
    return "; ".join(words(verdict, window, keys)) if window else str(verdict)


def final_words(lines: Sequence[Line], keys: Keys) -> Iterator[str]:
    """The paragraph on a run, from all of its lines; nothing of one with too few steps."""
    window = Window.of([line for line in lines if line.get("step", 0) > 0])
    if window is None or window.num_steps < MIN_STEPS:
        return
    first, *rest = words(judge(lost_shares(window)), window, keys)
    yield f"verdict on {window.num_steps} steps: {first}"
    yield from (f"verdict: {line}" for line in rest)
    ideal_s = window.overlap * window.step_s
    yield f"verdict: a step takes {window.step_s:.2f} s; the busiest stage works {ideal_s:.2f} s of it"
    yield f"verdict: the learner: {_listed(window.loop)}"
    yield f"verdict: workers: {_listed(window.workers)}"
    yield f"verdict: tokens: {_listed(window.fates)}"


def _listed(shares: Mapping[str, float]) -> str:
    """Those that show, the largest first."""
    shown = sorted(((share, name) for name, share in shares.items() if share >= 0.005), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in shown)
