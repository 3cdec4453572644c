"""The finished groups that wait for their batch: which are held, how many the next batch can count on, and its cut.

In: groups with a verdict. Out: the state in which each is held, the cut by the rule of `filter.mode`, and what is over.

    queued   kept: worth training on
    spare    not kept, and still good for something: for the batch (`on_limit: unfiltered`), for its place in the batch
             (`mode: replace`), or, at the barrier, because its prompt may go back to the stream

`mode: replace`. A batch takes the first `prompts_per_step` groups in queue order, kept or not; copies of its kept ones
stand in the places of the others. Where none of a batch's worth is kept there is nothing to copy: they are barren, and
sampling goes on. They end `filtered` at once, or with a limit of generation batches at the cut, for then `on_limit` may
need them, and the barrier counts its verdicts by what is held. At the limit, and when the data ends, no place is
copied: `on_limit` acts on the groups that are held as it does in `mode: filter`.

Does not own: when a batch is cut, and what becomes of prompts (`state.py`).
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
        """Hold a group, if it is good for anything. Returns its state."""
        if group.verdict == "kept":
            self.queued.append(group)
            return "queued"
        if self._replaces or self._barrier or (self._fills and group.verdict == "constant"):
            self.spare.append(group)
            return "spare"
        return "filtered"

    def ahead_of(self, before: int | None) -> tuple[list[HeldGroup], list[HeldGroup]]:
        """Those queued and those spare, at the barrier only those that stand before the next prompt of the stream."""
        if not self._barrier or before is None:
            return self.queued, self.spare
        kept, spare = ([group for group in groups if group.prompt_id < before] for groups in (self.queued, self.spare))
        return kept, spare

    def num_ready(self, before: int | None) -> int:
        """Groups that the next batch can count on: kept ones, under `replace` all but barren ones.

        `before`: the next prompt of the stream. At the barrier what stands behind it is not counted: the batch takes
        the first ones by `prompt_id`, and that prompt (its lease was lost) may be one of them.
        """
        kept, spare = self.ahead_of(before)
        return len(kept) + len(spare) - num_barren(kept, spare, self._size) if self._replaces else len(kept)

    def take_barren(self, before: int | None) -> list[HeldGroup]:
        """Remove and return what is barren and needn't be held."""
        if not self._replaces or self._limited:
            return []
        kept, spare = self.ahead_of(before)
        barren = sorted(spare)[: num_barren(kept, spare, self._size)]
        self._remove(barren)
        return barren

    def take_stale(self, bound: StalenessBound, step: int) -> list[HeldGroup]:
        """Remove and return what would miss the bound in batch `step`."""
        stale = [group for group in (*self.queued, *self.spare) if not bound.fits(group.min_version, step)]
        self._remove(stale)
        return stale

    def take_all(self) -> list[HeldGroup]:
        """Remove and return every group."""
        held, self.queued, self.spare = [*self.queued, *self.spare], [], []
        return held

    def cut(self, step: int, before: int | None, *, at_limit: bool, last: bool) -> Cut:
        """Cut batch `step` by the rule of `filter.mode`, and hold what waits for the next one. Without members nothing
        is cut, and all is held as it was.

        `before` as in `num_ready`. `at_limit`: the step is out of generation batches. `last`: no other batch follows,
        so nothing goes back to the stream.
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
