"""The complete groups that wait for a batch: which are held, how many the next batch can count on, and its cut.

In: groups with a verdict. Out: the state in which each is held, the cut by the rule of `filter.mode`, and the groups
that end.

    queued   kept: worth training on
    spare    not kept but still of use: the batch may need it (`on_limit: unfiltered`), a copy may replace it
             (`mode: replace`), or at the barrier its prompt may go back to the stream

`mode: replace`. A batch takes the first `prompts_per_step` groups in queue order, kept or not. Copies of its kept
groups replace the others. If none of a batch's worth of groups is kept, there is nothing to copy: they are barren, and
sampling continues. They end `filtered` at once. With a limit of generation batches they end at the cut instead, since
`on_limit` may need them, and since the barrier counts verdicts by the groups held. At the limit, and when the data
ends, there are no copies: `on_limit` applies to the held groups as in `mode: filter`.

Does not own: when a batch is cut, and what happens to prompts (`state.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core.batch import Cut, HeldGroup, cut, cut_with_copies, num_barren, return_behind
from asyncdapo.replay.core.staleness import StalenessBound


class Held:
    """Groups that are queued or spare."""

    def __init__(
        self, config: ReplayConfig, filter: FilterConfig, queued: Iterable[HeldGroup], spare: Iterable[HeldGroup]
    ) -> None:
        self.queued, self.spare = list(queued), list(spare)
        self._size, self._barrier = config.prompts_per_step, config.synchronous
        self._limited = filter.max_gen_batches > 0
        self._fills = self._limited and filter.on_limit == "unfiltered"
        self._replaces = filter.replaces

    def add(self, group: HeldGroup) -> Literal["queued", "spare", "filtered"]:
        """Hold a group if it is of use. Returns its state."""
        if group.verdict == "kept":
            self.queued.append(group)
            return "queued"
        if self._replaces or self._barrier or (self._fills and group.verdict == "constant"):
            self.spare.append(group)
            return "spare"
        return "filtered"

    def ahead_of(self, before: int | None) -> tuple[list[HeldGroup], list[HeldGroup]]:
        """The queued and the spare groups. At the barrier: only those before `before`, the stream's next prompt."""
        if not self._barrier or before is None:
            return self.queued, self.spare
        kept, spare = ([group for group in groups if group.prompt_id < before] for groups in (self.queued, self.spare))
        return kept, spare

    def num_ready(self, before: int | None) -> int:
        """Groups that the next batch can count on: the kept ones; under `replace` all but the barren ones.

        `before`: the stream's next prompt. At the barrier groups after it don't count: the batch takes the first groups
        by `prompt_id`, and that prompt, whose lease was lost, may be one of them.
        """
        kept, spare = self.ahead_of(before)
        return len(kept) + len(spare) - num_barren(kept, spare, self._size) if self._replaces else len(kept)

    def take_barren(self, before: int | None) -> list[HeldGroup]:
        """Remove and return the barren groups that needn't be held."""
        if not self._replaces or self._limited:
            return []
        kept, spare = self.ahead_of(before)
        barren = sorted(spare)[: num_barren(kept, spare, self._size)]
        self._remove(barren)
        return barren

    def take_stale(self, bound: StalenessBound, step: int) -> list[HeldGroup]:
        """Remove and return the groups that would miss the bound in batch `step`."""
        stale = [group for group in (*self.queued, *self.spare) if not bound.fits(group.min_version, step)]
        self._remove(stale)
        return stale

    def take_all(self) -> list[HeldGroup]:
        """Remove and return every group."""
        held, self.queued, self.spare = [*self.queued, *self.spare], [], []
        return held

    def cut(self, step: int, before: int | None, *, at_limit: bool, last: bool) -> Cut:
        """Cut batch `step` by the rule of `filter.mode`, and hold the groups for the next one. If the cut has no
        members, nothing changes.

        `before` as in `num_ready`. `at_limit`: the step is out of generation batches. `last`: no batch follows, so
        nothing goes back to the stream.
        """
        if self._replaces and self.num_ready(before) >= self._size:
            chosen = cut_with_copies(step, self.queued, self.spare, self._size)
        else:
            chosen = cut(self.queued, self.spare, self._size, fill=at_limit and self._fills)
        if self._barrier and not last:
            chosen = return_behind(chosen)
        if chosen.members:
            self.queued, self.spare = chosen.queued, chosen.spare
        return chosen

    def _remove(self, groups: list[HeldGroup]) -> None:
        gone = {group.group_id for group in groups}
        if gone:
            self.queued = [group for group in self.queued if group.group_id not in gone]
            self.spare = [group for group in self.spare if group.group_id not in gone]
