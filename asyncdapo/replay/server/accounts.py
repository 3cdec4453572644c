"""Accounts: what became of every group and every sampled token, as the metrics of a train step.

In: groups as they arrive, the core's actions, evaluation answers, and the ledger's totals at the start. Out: one dict
of metrics per step. Ratios, means and `rollout/arrived_…` are over the groups that arrived since the last step. All
other counts are totals since the start, so that

    rollout/tokens = replay/tokens_{trained, filtered, expired, surplus, undone, dropped, failed, withdrawn, lost, late}
                     + replay/tokens_{probe, evaluation, held, partial, in_flight}

except for those since the last heartbeat. After a restart of this process the totals of groups resume from the ledger,
exactly. The ledger lacks the tokens of evaluations and of leases that ended without a group. Their totals resume from
the last metrics line, so what was sampled for them after that line is missing. What was running at that line, became no
group and wasn't saved is lost with its workers.

Memory: the facts of held groups, and the lengths of their completions, within the limits of admission.
Does not own: the numbers of learner and engine; writing (the controller).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from asyncdapo.accounting.quantiles import QUANTILES, quantiles
from asyncdapo.eval_messages import EvalAnswer
from asyncdapo.messages import Group, staleness
from asyncdapo.replay.core.events import (
    LEASE_ENDS,
    VERDICT_STATES,
    DropPartial,
    EndLease,
    GroupState,
    MoveGroup,
)
from asyncdapo.replay.core.recovery import GroupFacts, Recovered

LEDGER_ENDS = ("trained", "filtered", "expired", "surplus", "undone", "dropped")
"""Ends of tokens that the ledger knows: those of groups; `undone`: by a rollback, those of running leases included;
`dropped`: saved for a group that wasn't continued."""
UNGROUPED_ENDS = ("failed", "withdrawn", "lost", "evaluation")
"""How tokens ended that never were in a group of the ledger."""
TOKEN_ENDS = (*LEDGER_ENDS, *UNGROUPED_ENDS)
WORKERS_ENDS = ("late", "probe")
"""Tokens whose end only their worker knows."""
CONTINUED = ("replay/continued_leases", "replay/continued_tokens")
MEANS = (
    "reward/mean",
    "filter/kept_ratio",
    "filter/all_correct_ratio",
    "filter/all_wrong_ratio",
    "reward/failed_ratio",
    "rollout/truncated_ratio",
    "rollout/response_tokens_mean",
)
"""Over the groups that arrived since the last step. Those on which the reward function raised count only in
`reward/failed_ratio`."""
EPISODE_MEANS = {
    "rollout/turns_mean": "turns",
    "rollout/contexts_mean": "contexts",
    "rollout/observed_tokens_mean": "observed",
    "rollout/out_of_turns_ratio": "out_of_turns",
    "rollout/out_of_time_ratio": "out_of_time",
}
"""Of a completion, over the same groups, with the sum that each is made of. There are none before the first completion
that isn't a single turn."""
SCORED = "reward/metrics/"
"""In front of the name of a number that the reward function or the environment gave each completion."""
MAX_SCORED = 128
"""Names of such numbers in a line. More than any completion may have: names that differ from one to another."""


@dataclass(kw_only=True)
class _Counts:
    """What the ledger knows as well: the groups held now, and totals since the start by how things ended."""

    held: dict[int, GroupFacts]
    tokens: Counter[str]
    completions: Counter[str]
    groups: Counter[str]
    lease_ends: Counter[str]
    num_verdicts: int
    num_gen_batches: int

    @classmethod
    def of(cls, recovered: Recovered) -> Self:
        totals = recovered.totals
        return cls(
            held=dict(recovered.facts),
            tokens=Counter(totals.tokens),
            completions=Counter(totals.completions),
            groups=Counter(totals.groups),
            lease_ends=Counter(totals.lease_ends),
            num_verdicts=totals.verdicts,
            num_gen_batches=totals.gen_batches,
        )


class Accounts:
    """Counts what the server handles; `trained` closes a step."""

    def __init__(self, totals: Mapping[str, float], recovered: Recovered) -> None:
        """`totals`: the last metrics line before this process; empty in a new run."""
        self._means = {name: totals.get(name, math.nan) for name in MEANS}
        self._means |= {name: totals[name] for name in EPISODE_MEANS if name in totals}
        self._scored_means = {name: number for name, number in totals.items() if name.startswith(SCORED)}
        self._interval: Counter[str] = Counter()
        """Sums over the groups that arrived since the last step."""
        self._scored: dict[str, list[float]] = {}
        """Over the same: sum and count of each number of the completions."""
        self._arrived_groups = self._arrived_tokens = 0
        self._last_step = 0
        self._ungrouped = Counter({end: int(totals.get(f"replay/tokens_{end}", 0)) for end in UNGROUPED_ENDS})
        self._counts = _Counts.of(recovered)
        undone_before = int(totals.get("replay/tokens_undone", 0))
        self._ungrouped["undone"] = max(0, undone_before - self._counts.tokens["undone"])
        self._sampled: list[int] = []
        """Lengths of the completions that arrived since the last step."""
        self._dropped: list[int] = []
        """Of those dropped for staleness since then, as far as they arrived at this process."""
        self._held_lengths: dict[int, list[int]] = {}
        """Of the held groups that arrived at this process."""
        sampled = dict.fromkeys((f"rollout/response_tokens_{name}" for name in QUANTILES), math.nan)
        dropped = [f"replay/dropped_response_tokens_{name}" for name in QUANTILES]
        self._lengths = sampled | {name: totals[name] for name in (*sampled, *dropped) if name in totals}
        self._continued = Counter({name: int(totals.get(name, 0)) for name in CONTINUED})
        known_to_workers = sum(int(totals.get(f"replay/tokens_{end}", 0)) for end in WORKERS_ENDS)
        saved = sum(partial.num_tokens for partial in recovered.partials.values())
        self.num_tokens = self._sum() + known_to_workers + saved
        """Accounted for at the start."""
        if not recovered.workers:
            running = max(0, int(totals.get("rollout/tokens", 0)) - self.num_tokens)
            self._ungrouped["lost"] += running
            self.num_tokens += running

    def resume_from(self, recovered: Recovered) -> None:
        """Count from what the ledger has after a rollback."""
        self._counts = _Counts.of(recovered)
        self._last_step = 0
        self._held_lengths.clear()

    def move_group(self, action: MoveGroup, arrived: Group | None) -> None:
        """A group has a new state. With its first state comes the group itself."""
        facts = self._counts.held.get(action.group_id)
        if facts is None:
            assert arrived is not None, f"{action} of a group that never arrived"
            facts = self._counts.held[action.group_id] = self._arrive(arrived, action.state)
        if action.state in TOKEN_ENDS:
            del self._counts.held[action.group_id]
            lengths = self._held_lengths.pop(action.group_id, [])
            self._dropped += lengths if action.state == "expired" else []
            self._counts.tokens[action.state] += facts.num_tokens
            self._counts.completions[action.state] += facts.num_completions
            self._counts.groups[action.state] += 1

    def end_lease(self, action: EndLease, num_tokens: int) -> None:
        """A lease is over; `num_tokens`: sampled for it so far, 0 for a late group, which was counted when it ended."""
        if action.outcome == "done":
            return
        self._counts.lease_ends[action.outcome] += 1
        self._ungrouped["lost" if action.outcome == "rejected" else action.outcome] += num_tokens - action.num_kept
        self._interval["failed"] += action.outcome == "failed"
        self._counts.groups["withdrawn_stale"] += action.outcome == "withdrawn" and action.reason == "stale"

    def count_begun(self, num_tokens: int) -> None:
        """A lease was granted behind so many tokens that were sampled before."""
        self._continued["replay/continued_leases"] += num_tokens > 0
        self._continued["replay/continued_tokens"] += num_tokens

    def drop_partial(self, action: DropPartial) -> None:
        """What was saved of a prompt is lost."""
        self._counts.tokens["dropped"] += action.num_lost

    def undo_leases(self, num_tokens: int) -> None:
        """A rollback ended all leases. `num_tokens` were sampled for them."""
        self._ungrouped["undone"] += num_tokens

    def count_evaluation(self, answers: Sequence[EvalAnswer]) -> int:
        """Returns their tokens."""
        num_tokens = sum(answer.num_tokens for answer in answers)
        self._ungrouped["evaluation"] += num_tokens
        return num_tokens

    def close_gen_batch(self) -> None:
        self._counts.num_gen_batches += 1

    def describe_unkept(self, many: int) -> str:
        """For people: the groups since the last train step that can't be trained on. Those that the filter dropped are
        named if there are at least `many`, those on which the reward function raised in any case."""
        now, said = self._interval, []
        if (filtered := now["verdicts"] - now["kept"]) >= many:
            right, wrong = now["all_correct"], now["all_wrong"]
            said.append(f"{filtered:,} groups filtered since the last batch: {right:,} all right, {wrong:,} all wrong")
        if failed := now["failed"]:
            said.append(f"{failed:,} groups failed since the last batch: the reward function raised")
        return "; ".join(said)

    def trained(self, step: int, batch: Iterable[GroupFacts], num_copies: int) -> dict[str, float]:
        """Metrics of a step whose groups have moved to `trained`. Begins the next interval. A repeated call doesn't."""
        if step > self._last_step:
            self._close_interval()
            self._last_step = step
        batch = list(batch)
        ages = [staleness(step, facts.min_version) for facts in batch]
        return {
            **self._means,
            **self._scored_means,
            "rollout/arrived_groups": self._arrived_groups,
            "rollout/arrived_tokens": self._arrived_tokens,
            "reward/filtered_mean": sum(facts.reward_mean for facts in batch) / len(batch),
            "filter/gen_batches": self._counts.num_gen_batches,
            "filter/prompts_consumed": self._counts.num_verdicts,
            "replay/train_steps": step,
            "replay/trained_groups": len(batch),
            "replay/copies": num_copies,
            "replay/staleness_mean": sum(ages) / len(ages),
            "replay/staleness_max": max(ages),
            **{f"rollout/{end}_leases": self._counts.lease_ends[end] for end in LEASE_ENDS},
            **{f"replay/tokens_{end}": self._counts.tokens[end] + self._ungrouped[end] for end in TOKEN_ENDS},
            "replay/tokens_held": self._num_held(),
            **self._continued,
            **self._lengths,
            **self._dropped_against_trained(),
        }

    def _sum(self) -> int:
        """Of all tokens that have an end here, or are of a held group."""
        return sum(self._counts.tokens[end] + self._ungrouped[end] for end in TOKEN_ENDS) + self._num_held()

    def _num_held(self) -> int:
        return sum(facts.num_tokens for facts in self._counts.held.values())

    def _arrive(self, group: Group, state: GroupState) -> GroupFacts:
        completions = group.completions
        self._counts.num_verdicts += state in VERDICT_STATES
        accs = group.metrics.get("acc", [])
        for name, number in {
            "groups": 1,
            "reward": group.reward_mean,
            "verdicts": state in VERDICT_STATES,
            "kept": state == "queued",
            "all_correct": accs.count(1) == len(completions),
            "all_wrong": accs.count(0) == len(completions),
            "truncated": group.finish_reasons["length"],
            "completions": len(completions),
            "tokens": group.num_sampled_tokens,
            "turns": sum([len(context.turns) for context in group.contexts]),
            "contexts": len(group.contexts),
            "observed": group.num_tokens - group.num_sampled_tokens,
            "out_of_turns": group.finish_reasons["turns"],
            "out_of_time": group.finish_reasons["time"],
        }.items():
            self._interval[name] += number
        self._sampled += group.completion_tokens
        self._held_lengths[group.lease_id] = group.completion_tokens
        for name, numbers in group.metrics.items():
            if name in self._scored or len(self._scored) < MAX_SCORED:
                scored = self._scored.setdefault(name, [0.0, 0])
                scored[0] += sum(numbers)
                scored[1] += len(numbers)
        return GroupFacts(
            group_id=group.lease_id,
            num_tokens=group.num_sampled_tokens,
            num_completions=len(completions),
            reward_mean=group.reward_mean,
            min_version=group.min_version,
        )

    def _close_interval(self) -> None:
        """If nothing arrived (the whole batch was queued before), the means stay as they are."""
        sums, self._interval = self._interval, Counter()
        scored, self._scored = self._scored, {}
        dropped, self._dropped = self._dropped, []
        if dropped:
            self._lengths |= {f"replay/dropped_response_tokens_{name}": n for name, n in quantiles(dropped).items()}
        self._arrived_groups, self._arrived_tokens = sums["groups"] + sums["failed"], sums["tokens"]
        if self._arrived_groups:
            self._means["reward/failed_ratio"] = sums["failed"] / self._arrived_groups
        if sums["groups"]:
            sampled, self._sampled = self._sampled, []
            self._lengths |= {f"rollout/response_tokens_{name}": n for name, n in quantiles(sampled).items()}
            self._means |= {
                "reward/mean": sums["reward"] / sums["groups"],
                "filter/kept_ratio": sums["kept"] / max(1, sums["verdicts"]),
                "filter/all_correct_ratio": sums["all_correct"] / sums["groups"],
                "filter/all_wrong_ratio": sums["all_wrong"] / sums["groups"],
                "rollout/truncated_ratio": sums["truncated"] / sums["completions"],
                "rollout/response_tokens_mean": sums["tokens"] / sums["completions"],
            }
            if sums["turns"] > sums["completions"] or sums["observed"] or "rollout/turns_mean" in self._means:
                self._means |= {name: sums[part] / sums["completions"] for name, part in EPISODE_MEANS.items()}
            self._scored_means = {f"{SCORED}{name}": total / count for name, (total, count) in scored.items()}

    def _dropped_against_trained(self) -> dict[str, float]:
        """Stale groups have long answers. How many are dropped, and how much longer they are, shows the bias."""
        counts = self._counts
        dropped = counts.groups["expired"] + counts.groups["withdrawn_stale"]
        ended = dropped + counts.groups["trained"] + counts.groups["filtered"]
        return {
            "replay/dropped_ratio": dropped / ended,
            "replay/trained_response_tokens_mean": counts.tokens["trained"] / counts.completions["trained"],
            "replay/dropped_response_tokens_mean": counts.tokens["expired"] / max(1, counts.completions["expired"]),
        }


def in_flight(metrics: Mapping[str, float]) -> float:
    """Of the tokens sampled so far, as of each worker's last heartbeat or answer, those without any end: of running
    leases and evaluations."""
    known = sum(metrics[f"replay/tokens_{name}"] for name in (*TOKEN_ENDS, *WORKERS_ENDS, "held", "partial"))
    return metrics["rollout/tokens"] - known
