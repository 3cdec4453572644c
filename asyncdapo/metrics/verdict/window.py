"""Window: what the processes of a run did over some train steps, from the lines of metrics.jsonl alone.

In: lines of successive steps; the first one is where counts that only rise begin. Out: shares of time that sum to 1, of
the training loop and of the workers; what became of the tokens; how busy the stages were. Invariant: a pure function of
the lines, so a run that is live, finished or resumed is read alike. Does not own: what limits the run (`verdict`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mode
from typing import Self

from asyncdapo.accounting.names import WORKER_STATES

Line = Mapping[str, float]

LOOP = ("wait", "train", "publish", "checkpoint", "report", "parity")
"""States of the training loop, `controller/STATE_s`."""
BETWEEN = ("publish", "checkpoint", "report", "parity")
"""Those between a train step and the next one, beside which the learner may already compute (`learner/ahead_s`)."""
FATES = tuple("trained filtered evaluation expired withdrawn late surplus lost undone dropped failed".split())
"""How tokens end, `replay/tokens_FATE`."""
SHOWN_FATES = tuple(
    "trained filtered expired surplus undone dropped failed withdrawn lost late probe evaluation".split()
)
"""`FATES` and that of probes, in the order in which charts and panels have them."""
MIN_COVERED = 0.5
"""Share of the time for which workers must have told what they did. Their heartbeats may lag."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Shares are of 1; NaN stands for what isn't known."""

    num_steps: int
    step_s: float
    """Mean time of a step."""
    loop: Mapping[str, float]
    """Shares of `LOOP`. While the learner computes, the loop trains, whatever is done beside it."""
    workers: Mapping[str, float]
    """Shares of `WORKER_STATES`."""
    slots: float
    """Mean number of sequences that a worker runs while it generates."""
    verifiers_busy: float
    replay_busy: float
    fates: Mapping[str, float]
    """Shares of `FATES`, of the tokens that ended."""
    all_correct: float
    all_wrong: float
    slowest_worker: int
    """In most of the steps."""
    slowest_pace: float
    """Its tokens per second, as a share of the mean of the other workers, in the mean over the steps."""
    num_workers: float
    """That lived, in the mean over time."""
    run_ahead: float
    """In force at the end."""

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Self | None:
        """None if the lines are too few, or lack what workers did."""
        steps = lines[1:]
        seconds = sum(line.get("time/step_s", 0.0) for line in steps)
        workers = {state: _rise(lines, f"rollout/time/{state}_s") for state in WORKER_STATES}
        worker_s = sum(line.get("replay/workers", 0.0) * line.get("time/step_s", 0.0) for line in steps)
        if not steps or not seconds or not sum(workers.values()) >= MIN_COVERED * worker_s > 0:
            return None
        loop = {state: sum(line.get(f"controller/{state}_s", 0.0) for line in steps) for state in LOOP}
        busy_s, idle_s = (_rise(lines, f"reward/time/{state}_s") for state in ("busy", "idle"))
        replay_idle_s = _rise(lines, "replay/time/idle_s")
        fates = {fate: _rise(lines, f"replay/tokens_{fate}") for fate in FATES}
        return cls(
            num_steps=len(steps),
            step_s=seconds / len(steps),
            loop=_shares(_trained_ahead(loop, sum(line.get("learner/ahead_s", 0.0) for line in steps))),
            workers=_shares(workers),
            slots=_share(_rise(lines, "rollout/running_s"), workers["generate"]),
            verifiers_busy=_share(busy_s, busy_s + idle_s),
            replay_busy=1 - _share(replay_idle_s, seconds),
            fates=_shares(fates),
            all_correct=_mean(line.get("filter/all_correct_ratio", math.nan) for line in steps),
            all_wrong=_mean(line.get("filter/all_wrong_ratio", math.nan) for line in steps),
            slowest_worker=mode(int(line.get("rollout/slowest_worker", 0)) for line in steps),
            slowest_pace=_mean(map(_slowest_pace, steps)),
            num_workers=worker_s / seconds,
            run_ahead=lines[-1].get("replay/run_ahead", math.nan),
        )

    @property
    def overlap(self) -> float:
        """How much of the time the busiest stage works: 1 if every other is hidden behind it."""
        stages = (1 - self.loop["wait"], 1 - self.workers["lease"], self.verifiers_busy, self.replay_busy)
        return max((busy for busy in stages if math.isfinite(busy)), default=math.nan)


def _trained_ahead(loop: Mapping[str, float], ahead_s: float) -> dict[str, float]:
    """Seconds of `LOOP`, of which these belong to `train` instead of `BETWEEN`. The gap beside which a step
    was ahead is in the line before it; a window takes them together."""
    between_s = sum(loop[state] for state in BETWEEN)
    left = max(0.0, 1 - ahead_s / between_s) if between_s else 0.0
    parts = {state: loop[state] * left for state in BETWEEN}
    return {**loop, **parts, "train": loop["train"] + between_s - sum(parts.values())}


def _rise(lines: Sequence[Line], name: str) -> float:
    """Of a count that only rises; NaN without it."""
    return lines[-1].get(name, math.nan) - lines[0].get(name, math.nan) if lines else math.nan


def _mean(numbers: Iterable[float]) -> float:
    known = [number for number in numbers if math.isfinite(number)]
    return sum(known) / len(known) if known else math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _shares(parts: Mapping[str, float]) -> dict[str, float]:
    """A part that isn't known, or fell because it was counted again, is 0."""
    known = {name: max(0.0, part) if math.isfinite(part) else 0.0 for name, part in parts.items()}
    whole = sum(known.values())
    return {name: part / whole if whole else 0.0 for name, part in known.items()}


def _slowest_pace(line: Line) -> float:
    """As of its step: the latest heartbeats of each worker, too few to tell a pause from a slow worker."""
    num_workers = line.get("replay/workers", 0.0)
    mean, slowest = (line.get(f"rollout/worker_tokens_per_s_{which}", math.nan) for which in ("mean", "min"))
    return _share(slowest, (num_workers * mean - slowest) / (num_workers - 1)) if num_workers > 1 else math.nan
