"""Accounts: what became of every group and every sampled token, as the metrics of a train step.

In: groups as they arrive, the core's actions, evaluation answers. Out: one dict of metrics per step. Ratios and means
are over the groups that arrived since the last step, and so is `rollout/arrived_tokens`; all other counts and tokens
are totals since the start, so that

    rollout/tokens = replay/tokens_{trained, filtered, expired, surplus, failed, withdrawn, lost, evaluation}
                     + what is queued, running or on its way

up to the last heartbeat, and to what a worker samples for a lease after its end. Does not own: the learner's and the
engine's numbers; writing (the controller).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncdapo.messages import EvalAnswer, Group
from asyncdapo.replay.events import EndLease, GroupState, MoveGroup

TOKEN_ENDS = ("trained", "filtered", "expired", "surplus", "failed", "withdrawn", "lost", "evaluation")
LEASE_ENDS = ("late", "withdrawn", "lost", "rejected", "failed")
VERDICTS: tuple[GroupState, ...] = ("queued", "spare", "filtered")
"""States that a group gets with its verdict; `queued` means kept."""


@dataclass(frozen=True)
class _Facts:
    """What is remembered of a group until its end."""

    num_tokens: int
    num_completions: int
    reward: float
    min_version: int


@dataclass
class _Interval:
    """Groups that arrived since the last step."""

    rewards: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class Accounts:
    """Counts what the server handles; `trained` closes a step."""

    def __init__(self) -> None:
        self._held: dict[int, _Facts] = {}
        self._interval = _Interval()
        self._means: dict[str, float] = {}
        self._tokens: Counter[str] = Counter()
        self._lease_ends: Counter[str] = Counter()
        self._completions: Counter[str] = Counter()
        self._groups: Counter[str] = Counter()
        self._batches: dict[int, list[_Facts]] = {}

    def move_group(self, action: MoveGroup, arrived: Group | None) -> None:
        """A group has a new state; its first one comes with the group itself."""
        facts = self._held.get(action.group_id)
        if facts is None:
            assert arrived is not None, f"{action} of a group that never arrived"
            facts = self._held[action.group_id] = self._arrive(arrived, action.state)
        if action.state in TOKEN_ENDS:
            del self._held[action.group_id]
            self._tokens[action.state] += facts.num_tokens
            self._completions[action.state] += facts.num_completions
            self._groups[action.state] += 1
        if action.state == "trained":
            self._batches.setdefault(action.step, []).append(facts)

    def end_lease(self, action: EndLease, num_tokens: int) -> None:
        """A lease is over; `num_tokens`: sampled for it so far, 0 for a late group, which was counted when it ended."""
        if action.outcome == "done":
            return
        self._lease_ends[action.outcome] += 1
        self._tokens["lost" if action.outcome == "rejected" else action.outcome] += num_tokens
        self._groups["withdrawn_stale"] += action.outcome == "withdrawn" and action.reason == "stale"

    def count_evaluation(self, answers: Sequence[EvalAnswer]) -> None:
        self._tokens["evaluation"] += sum(answer.num_tokens for answer in answers)

    def trained(self, step: int) -> dict[str, float]:
        """Metrics of a step, once its groups have moved to `trained`. Opens the next interval."""
        batch = self._batches.pop(step)
        staleness = [step - 1 - facts.min_version for facts in batch]
        self._means |= self._interval_means()
        arrived_tokens = self._interval.counts["tokens"]
        self._interval = _Interval()
        return {
            **self._means,
            "rollout/arrived_tokens": arrived_tokens,
            "reward/filtered_mean": sum(facts.reward for facts in batch) / len(batch),
            "replay/trained_groups": len(batch),
            "replay/staleness_mean": sum(staleness) / len(staleness),
            "replay/staleness_max": max(staleness),
            **{f"rollout/{end}_leases": self._lease_ends[end] for end in LEASE_ENDS},
            **{f"replay/tokens_{end}": self._tokens[end] for end in TOKEN_ENDS},
            **self._dropped_against_trained(),
        }

    def _arrive(self, group: Group, state: GroupState) -> _Facts:
        completions = group.completions
        reward = sum(completion.reward for completion in completions) / len(completions)
        accs = [completion.metrics.get("acc") for completion in completions]
        self._interval.rewards.append(reward)
        self._interval.counts += Counter(
            verdicts=state in VERDICTS,
            kept=state == "queued",
            all_correct=all(acc == 1 for acc in accs),
            all_wrong=all(acc == 0 for acc in accs),
            truncated=sum(completion.finish_reason == "length" for completion in completions),
            completions=len(completions),
            tokens=group.num_tokens,
        )
        return _Facts(group.num_tokens, len(completions), reward, group.min_version)

    def _interval_means(self) -> dict[str, float]:
        """None when nothing arrived (all of the batch was queued before): the last ones stand."""
        counts, num_groups = self._interval.counts, len(self._interval.rewards)
        if num_groups == 0:
            return {}
        return {
            "reward/mean": sum(self._interval.rewards) / num_groups,
            "filter/kept_ratio": counts["kept"] / max(1, counts["verdicts"]),
            "filter/all_correct_ratio": counts["all_correct"] / num_groups,
            "filter/all_wrong_ratio": counts["all_wrong"] / num_groups,
            "rollout/truncated_ratio": counts["truncated"] / counts["completions"],
            "rollout/response_tokens_mean": counts["tokens"] / counts["completions"],
        }

    def _dropped_against_trained(self) -> dict[str, float]:
        """Dropping stale groups drops long answers; how many, and how much longer they are, shows the bias."""
        dropped = self._groups["expired"] + self._groups["withdrawn_stale"]
        ended = dropped + self._groups["trained"] + self._groups["filtered"]
        lengths = {end: self._tokens[end] / self._completions[end] for end in self._completions}
        return {
            "replay/dropped_ratio": dropped / ended,
            "replay/trained_response_tokens_mean": lengths["trained"],
            "replay/dropped_response_tokens_mean": lengths.get("expired", 0.0),
        }
