"""Advice: the key to change, and by how much, for each verdict.

In: the verdict, the window that it was made of, the keys in force. Out: a sentence, and the keys with their new values.
Amounts are what would end the waiting if the rest stayed as it is, so never more than a few times what is there. Pure.
Does not own: what limits a run (`verdict`), whether there is room for more workers or slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from asyncdapo.metrics.verdict.verdict import BALANCED, LIMITS, Verdict
from asyncdapo.metrics.verdict.window import Window

Keys = Mapping[str, float]
"""The values in force of `KEYS`; NaN where it is `auto`."""
KEYS = (
    "rollout.num_workers",
    "rollout.slots",
    "rollout.group_size",
    "reward.processes",
    "environment.processes",
    "replay.run_ahead",
    "replay.max_staleness",
    "replay.prompts_per_step",
    "learner.ranks",
    "learner.tokens_per_microbatch",
    "learner.checkpoint_every",
    "eval.every",
)
MOST = 4.0
"""No key is raised by a larger factor at once."""
USED = 0.5
"""Workers whose slots are used less have too few leases; verifiers that are busier have too much to do."""
PUBLISH_SHARE = 0.1
"""Of a step, what publishing may take."""


@dataclass(frozen=True)
class Advice:
    """What to change, in words and in keys."""

    text: str
    changes: Mapping[str, float] = field(default_factory=dict)


def keys_in_force(config: object) -> Keys:
    """From the whole configuration of a run. Of a range of workers it is the most."""
    values = {key: attrgetter(key.replace("num_workers", "max_workers"))(config) for key in KEYS}
    return {key: math.nan if value == "auto" else float(value) for key, value in values.items()}


def advise(verdict: Verdict, window: Window, keys: Keys) -> Advice | None:
    """None if nothing is worth a change, or it isn't sure what."""
    rule = RULES.get(verdict.limit)
    return rule(window, keys) if rule else None


def words(verdict: Verdict, window: Window, keys: Keys) -> Iterator[str]:
    """For people: what it is, why, and what to change."""
    if verdict.limit == BALANCED:
        yield BALANCED
        return
    rivals = verdict.rivals or (verdict.limit,)
    yield f"{verdict}: {', or '.join(LIMITS[limit] for limit in rivals)}"
    if advice := advise(verdict, window, keys):
        yield advice.text


def _more_rollout(window: Window, keys: Keys) -> Advice:
    factor = _factor(window.loop["wait"])
    if window.slots < USED * keys["rollout.slots"]:
        used = window.slots / keys["rollout.slots"]
        return _run_ahead(window, keys, f"only {used:.0%} of the slots are used: ")
    slots, workers = (_raised(key, keys, factor) for key in ("rollout.slots", "rollout.num_workers"))
    return Advice(f"{_said(slots, keys)}, or {_said(workers, keys)}", slots)


def _other_worker(window: Window, keys: Keys) -> Advice:
    slow = f"worker {window.slowest_worker} has {window.slowest_pace:.0%} of the others' speed"
    return Advice(f"{slow}: see what else its host does, or move it (controller.placement)")


def _other_data(window: Window, keys: Keys) -> Advice:
    if not window.all_correct < window.all_wrong:
        return Advice("mostly all right: take harder prompts (prompts.path)")
    group_size = {"rollout.group_size": 2 * keys["rollout.group_size"]}
    return Advice(f"mostly all wrong: take easier prompts (prompts.path), or {_said(group_size, keys)}", group_size)


def _rarer_evaluation(window: Window, keys: Keys) -> Advice:
    return _change(_raised("eval.every", keys, _factor(window.loop["wait"])), keys)


def _fewer_dropped(window: Window, keys: Keys) -> Advice:
    staleness = {"replay.max_staleness": keys["replay.max_staleness"] + 1}
    or_less = "" if math.isnan(keys["replay.run_ahead"]) else ", or lower replay.run_ahead"
    return Advice(f"{_said(staleness, keys)}{or_less}", staleness)


def _more_verifiers(window: Window, keys: Keys) -> Advice:
    if window.verifiers_busy < USED:
        idle = f"verifiers are idle {1 - window.verifiers_busy:.0%} of the time, a call takes long"
        return Advice(f"{idle}: make it faster, or async (reward.concurrency)")
    return _change(_raised("reward.processes", keys, _hidden(window, "score")), keys)


def _more_environments(window: Window, keys: Keys) -> Advice:
    processes = _raised("environment.processes", keys, _hidden(window, "environment"))
    return Advice(f"{_said(processes, keys)}, or raise environment.oversubscribe", processes)


def _faster_replay(window: Window, keys: Keys) -> Advice:
    return _run_ahead(window, keys, f"replay works {window.replay_busy:.0%} of the time, a disk or link is slow: ")


def _rarer_publish(window: Window, keys: Keys) -> Advice:
    factor = min(MOST, window.loop["publish"] / PUBLISH_SHARE)
    prompts = _raised("replay.prompts_per_step", keys, factor)
    return Advice(f"see weights/…_s and weights.backend; or publish less often: {_said(prompts, keys)}", prompts)


def _faster_learner(window: Window, keys: Keys) -> Advice:
    factor = _factor(window.workers["lease"])
    ranks, packed = (_raised(key, keys, factor) for key in ("learner.ranks", "learner.tokens_per_microbatch"))
    return Advice(f"{_said(packed, keys)}, or {_said(ranks, keys)}", packed)


def _rarer_checkpoint(window: Window, keys: Keys) -> Advice:
    return _change(_raised("learner.checkpoint_every", keys, 2.0), keys)


def _run_ahead(window: Window, keys: Keys, why: str = "") -> Advice:
    if math.isnan(keys["replay.run_ahead"]):
        most = {"replay.max_staleness": keys["replay.max_staleness"] + 1}
        said = f"replay.run_ahead=auto is {window.run_ahead:.2g}: {_said(most, keys)}"
        return Advice(why + said, most)
    run_ahead = keys["replay.run_ahead"] + (0.5 if keys["replay.run_ahead"] >= 1 else 1.0)
    changes = {"replay.run_ahead": run_ahead}
    if run_ahead > keys["replay.max_staleness"]:
        changes["replay.max_staleness"] = float(math.ceil(run_ahead))
    return Advice(why + _said(changes, keys), changes)


RULES: Mapping[str, Callable[[Window, Keys], Advice]] = {
    "rollout": _more_rollout,
    "straggler": _other_worker,
    "data": _other_data,
    "evaluation": _rarer_evaluation,
    "dropped": _fewer_dropped,
    "reward": _more_verifiers,
    "environment": _more_environments,
    "transport": _faster_replay,
    "publish": _rarer_publish,
    "learner": _faster_learner,
    "checkpoint": _rarer_checkpoint,
    "run_ahead": _run_ahead,
}


def _factor(waiting: float) -> float:
    """How much faster the other side has to be so that this share of the time isn't waited."""
    return min(MOST, 1 / (1 - waiting)) if waiting < 1 else MOST


def _hidden(window: Window, state: str) -> float:
    """How much faster this has to be to hide behind generation."""
    generate = window.workers["generate"]
    return min(MOST, (generate + window.workers[state]) / generate) if generate else MOST


def _raised(key: str, keys: Keys, factor: float) -> dict[str, float]:
    return {key: float(max(keys[key] + 1, math.ceil(keys[key] * factor)))}


def _change(changes: Mapping[str, float], keys: Keys) -> Advice:
    return Advice(_said(changes, keys), changes)


def _said(changes: Mapping[str, float], keys: Keys) -> str:
    return "raise " + " and ".join(f"{key} from {keys[key]:g} to {value:g}" for key, value in changes.items())
