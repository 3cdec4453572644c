"""Verdict: what limits a run, and how much of its time is lost to that.

    both sides wait            they take turns             run_ahead
    the learner alone waits    for what the workers did    generate → straggler, data, evaluation, dropped, rollout
                                                           score → reward      environment → environment
                                                           send → transport    load → publish
    workers alone wait         for what the loop did       train → learner     publish, checkpoint

In: a `Window`. Out: the share of the time that is lost to each of `LIMITS`. They sum to the larger of two shares: the
training loop waits for a batch, or workers have no lease. Generation is divided by what became of the tokens. Pure.
Does not own: what to change (`advice`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from asyncdapo.metrics.verdict.window import Window

LIMITS = {
    "rollout": "the learner waits for tokens that are trained on",
    "straggler": "one worker is slower than the others",
    "data": "groups are sampled that the filter drops",
    "evaluation": "the learner waits while evaluations are sampled",
    "dropped": "tokens are sampled that are never trained on",
    "reward": "engines stand idle while verifiers judge",
    "environment": "engines stand idle while environments work",
    "transport": "engines stand idle until the replay server has their groups",
    "publish": "the others wait for new weights to arrive",
    "learner": "workers get no lease until the learner has trained",
    "checkpoint": "workers get no lease while a checkpoint is copied",
    "run_ahead": "workers and learner wait for each other in turns",
}
BALANCED, UNSURE = "balanced", "not sure"
MIN_LOST = 0.1
"""Less is not worth a change."""
MIN_LEAD = 0.05
"""Two shares that are nearer to each other can't be told apart."""
MIN_FILTERED = 0.6
"""A filter that drops a smaller share of the tokens does what it is there for."""
SLOW = 0.6
"""A worker that is slower than this share of the others' pace is a straggler."""
OF_LOOP = {"train": "learner", "publish": "publish", "checkpoint": "checkpoint"}
OF_WORKERS = {"score": "reward", "environment": "environment", "send": "transport", "load": "publish"}
OF_TOKENS = {"filtered": "data", "evaluation": "evaluation", "trained": "rollout"}
"""All other tokens are `dropped`."""


@dataclass(frozen=True)
class Verdict:
    """`limit`: one of `LIMITS`, `BALANCED` or `UNSURE`; of the last, `rivals` are the two that it may be."""

    limit: str
    lost: float
    """Share of the time."""
    rivals: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.limit == BALANCED:
            return BALANCED
        what = f"not sure, {' or '.join(self.rivals)}-bound" if self.rivals else f"{self.limit}-bound"
        return f"{what}, {self.lost:.0%} of the time is lost"


def lost_shares(window: Window) -> dict[str, float]:
    """By `LIMITS`. A straggler holds leases that others could have: they wait for it, too, so what it costs is taken
    from both sides."""
    waiting, unleased = window.loop["wait"], window.workers["lease"]
    lost = dict.fromkeys(LIMITS, 0.0)
    lost["straggler"] = min(waiting, _lost_to_straggler(window))
    waiting, unleased = waiting - lost["straggler"], max(0.0, unleased - lost["straggler"])
    lost["run_ahead"] = min(waiting, unleased)
    alone = abs(waiting - unleased)
    if waiting > unleased:
        _divide(lost, alone, _of_workers(window))
    else:
        _divide(lost, alone, {OF_LOOP[state]: window.loop[state] for state in OF_LOOP})
    return lost


def judge(lost: Mapping[str, float]) -> Verdict:
    """What the shares say."""
    ranked = sorted(lost, key=lambda limit: -lost[limit])
    first, second = ranked[:2]
    if sum(lost.values()) < MIN_LOST:
        return Verdict(BALANCED, sum(lost.values()))
    if lost[first] - lost[second] < MIN_LEAD:
        return Verdict(UNSURE, lost[first] + lost[second], (first, second))
    return Verdict(first, lost[first])


def _of_workers(window: Window) -> dict[str, float]:
    """What the workers did while they had leases, by what it is lost to."""
    parts = dict.fromkeys(LIMITS, 0.0)
    for state, limit in OF_WORKERS.items():
        parts[limit] += window.workers[state]
    fates = window.fates if any(window.fates.values()) else {"trained": 1.0}
    for fate, share in fates.items():
        limit = OF_TOKENS.get(fate, "dropped")
        usual = limit == "data" and share < MIN_FILTERED
        parts["rollout" if usual else limit] += window.workers["generate"] * share
    return parts


def _lost_to_straggler(window: Window) -> float:
    """Share of a step that would be saved if the slowest worker were as fast as the others, and the learner waited for
    nothing else."""
    pace = window.slowest_pace
    return (1 - pace) / window.num_workers if math.isfinite(pace) and pace < SLOW else 0.0


def _divide(lost: dict[str, float], share: float, parts: Mapping[str, float]) -> None:
    """Add the share to `lost` in proportion to the parts."""
    whole = sum(parts.values())
    for limit, part in parts.items():
        lost[limit] += share * part / whole if whole else 0.0
