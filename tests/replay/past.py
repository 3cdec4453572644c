"""What a rollback leaves, by the rules of docs/ledger.md written down a second time, in the plainest way.

It knows nothing of tables: it goes through the groups and prompts that `Truth` has seen, asks of each what was so when
the checkpoint's batch was trained, and says what must be so now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncdapo.replay.core import events as core
from tests.replay.account import TrueGroup
from tests.replay.truth import Truth

ENDS = ("trained", "filtered", "expired", "failed", "unused")
LIVE = ("queued", "spare", "cut", "trained", "filtered")
FIRST = -1


@dataclass
class Mark:
    """What was so right after a batch was trained."""

    num_events: int = 0
    prompts: dict[int, str] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)


class TruthWithPast(Truth):
    """`roll_back(step)` goes back to the weights of that step."""

    def __init__(self, *args: object, **limits: object) -> None:
        super().__init__(*args, **limits)
        self.marks = {0: Mark()}
        self.closings: list[tuple[int, int, int]] = []
        """Of generation batches: number of the event, step, number in that step."""
        self.cuts: list[tuple[int, int]] = []
        """In every branch: number of the event, step."""
        self.leased_at_the_end: set[int] = set()

    def observe(self, event: core.Event, actions: Sequence[core.Action]) -> None:
        if isinstance(event, core.RunEnded):
            self.leased_at_the_end |= {lease.prompt_id for lease in self.leases.values()}
        super().observe(event, actions)
        for action in actions:
            if isinstance(action, core.GenBatchClosed):
                self.closings.append((self.num_events, action.step, action.number))
            if isinstance(action, core.CutBatch):
                self.cuts.append((self.num_events, action.step))
        if isinstance(event, core.Trained):
            self.marks[event.step] = Mark(self.num_events, dict(self.prompts), Counter(self.attempts))

    def roll_back(self, step: int) -> None:
        self.num_events += 1
        mark, was_cut, at_limit = self.marks[step], step + 1 in self.batches, self.at_limit
        in_flight = {lease.prompt_id for lease in self.leases.values()}
        in_flight |= self.leased_at_the_end | self.partials.keys()
        self.ended_leases |= self.leases.keys()
        self.leases, self.loaded, self.credits = {}, {}, {}
        self.num_cut, self.published, self.wanted, self.over = step + was_cut, step, 0, False
        self.batches = {k: members for k, members in self.batches.items() if k <= step + was_cut}
        self.copies = {k: copies for k, copies in self.copies.items() if k <= step + was_cut}
        self.trained = set(range(1, step + 1))
        self.withdrawn_stale = [event for event in self.withdrawn_stale if event <= mark.num_events]
        self.num_since_due = 0
        self.measured = [measured for measured in self.measured if measured[0] <= step]
        moved = self._settle_groups(step, mark, was_cut)
        for prompt_id in self.prompts:
            if mark.prompts.get(prompt_id) not in ENDS or prompt_id in moved:
                self._settle_prompt(prompt_id, mark, prompt_id in in_flight)
        self.partials = {
            prompt_id: partial
            for prompt_id, partial in self.partials.items()
            if self.prompts[prompt_id] == "waiting"
            and partial.max_version <= step
            and self.fits(partial.min_version, self.next_step)
        }
        self.lost.clear()
        self.leased_at_the_end.clear()
        self.attempts = Counter({p: self.attempts[p] for p in self.prompts})
        self._count_verdicts_again(step)
        self.at_limit = at_limit and not was_cut
        self.marks = {k: m for k, m in self.marks.items() if k <= step}

    # ------------------------------------------------------------------------------------------------------ groups

    def _settle_groups(self, step: int, mark: Mark, was_cut: bool) -> set[int]:
        """Returns the prompts whose group has another state now."""
        moved: set[int] = set()
        members = set(self.batches[step + 1]) if was_cut else set()
        followed: set[int] = set()
        for group_id in sorted(self.groups, reverse=True):
            group = self.groups[group_id]
            if group.max_version > step or (group.was_stale and group.arrived > mark.num_events):
                del self.groups[group_id]
                continue
            if group_id in members:
                now = "cut"
            elif self._has_settled(group, mark):
                now = group.state
            elif group.prompt_id in followed:
                now = "gone"
            else:
                now = self._held_again(group, was_cut)
            if now == "gone":
                del self.groups[group_id]
                continue
            followed.add(group.prompt_id)
            if now != group.state:
                group.state, group.changed, group.reason = now, self.num_events, ""
                moved.add(group.prompt_id)
        return moved

    def _has_settled(self, group: TrueGroup, mark: Mark) -> bool:
        """It had an end that a rollback doesn't touch."""
        if group.state == "filtered":
            return not (self.replaces and self._ended_at_undone_cut(group))
        if group.state == "surplus" and group.reason != "run ended":
            return True
        return group.state in ("trained", "expired") and group.changed <= mark.num_events

    def _ended_at_undone_cut(self, group: TrueGroup) -> bool:
        """A copy took its place in a batch that is to be cut anew."""
        return any(group.changed == event and step >= self.next_step for event, step in self.cuts)

    def _held_again(self, group: TrueGroup, was_cut: bool) -> str:
        fits = self.fits(group.min_version, self.next_step)
        had_expired = group.state == "expired" and not fits
        if group.verdict != "kept" and not had_expired:
            return "spare" if fits and (self.replaces or not was_cut) else "filtered"
        if fits:
            return "queued"
        return "gone" if self.config.on_stale == "requeue" else "expired"

    # ---------------------------------------------------------------------------------------------------- prompts

    def _settle_prompt(self, prompt_id: int, mark: Mark, in_flight: bool) -> None:
        groups = [group for group in self.groups.values() if group.prompt_id == prompt_id]
        live = [group.state for group in groups if group.state in LIVE]
        expired = [group for group in groups if group.state == "expired" and group.changed > mark.num_events]
        before, place = self.prompts[prompt_id], self.places.get(prompt_id)
        unmoved = self.prompt_changed[prompt_id] <= mark.num_events
        self.attempts[prompt_id] = mark.attempts[prompt_id]
        if live:
            [self.prompts[prompt_id]] = live
        elif expired:
            self.prompts[prompt_id] = "expired"
        else:
            self.prompts[prompt_id] = "waiting"
            if before != "waiting" or not (unmoved or place == FIRST):
                self.places[prompt_id] = FIRST if in_flight and not self.barrier else prompt_id
        if (self.prompts[prompt_id], self.places.get(prompt_id)) != (before, place):
            self.prompt_changed[prompt_id] = self.num_events

    # --------------------------------------------------------------------------------------------------- verdicts

    def _count_verdicts_again(self, step: int) -> None:
        """What a closed generation batch of the steps up to the restored one counted stays counted."""
        self.closings = [closing for closing in self.closings if closing[1] <= step + 1]
        since = self.closings[-1][0] if self.closings else 0
        verdicts = [group_id for group_id in self.verdicts if group_id in self.groups]
        self.verdicts = [group_id for group_id in verdicts if self.groups[group_id].arrived <= since]
        self.gen_batch_verdicts, counted = 0, None
        for group_id in verdicts[len(self.verdicts) :]:
            group = self.groups[group_id]
            group.step = min(group.step, step + 1)
            if group.step != counted:
                counted, self.gen_batches_of_step = group.step, self._num_closed(group.step)
            self.count_verdict(group_id, group.step)
            if self.gen_batch_verdicts == self.filter.gen_batch_multiplier * self.size:
                self.gen_batch_verdicts = 0
        if counted != self.next_step:
            self.gen_batches_of_step = self._num_closed(self.next_step)

    def _num_closed(self, step: int) -> int:
        return max((number for _, of, number in self.closings if of == step), default=0)
