"""The groups that wait for a batch, and the batch that is filled from them: when it is cut, and what then ends.

In: groups with a verdict, the learner's wish, the close of a generation batch. Out: actions, and the batch among those
that are cut. Invariants: batches are cut in the order of steps; every held group fits the batch that is being filled,
so every member fits its batch.

    queued     kept: worth training on
    spare      not kept but still of use: the batch may need it (`on_limit: unfiltered`), a copy may replace it
               (`mode: replace`), or at the barrier its prompt may go back to the stream
    due        the learner wants the batch and it is full, or the step has used up its generation batches
    held back  a due cut waits. `run_ahead: 0`: until nothing runs. Otherwise for leases that it would make stale, if
               `on_stale` is `wait` or `auto` (`staleness.py`), or the learner still has the batch before
    begin      with the next step, every group and lease that would miss the bound in its batch ends

`mode: replace`. A batch takes the first `prompts_per_step` groups in queue order, kept or not. Copies of its kept
groups replace the others. If none of a batch's worth of groups is kept, there is nothing to copy: they are barren, and
sampling continues. They end `filtered` at once. With a limit of generation batches they end at the cut instead, since
`on_limit` may need them, and since the barrier counts verdicts by the groups held. At the limit, and when the data
ends, there are no copies: `on_limit` applies to the held groups as in `mode: filter`.

Does not own: which of the groups a cut takes (`batch.py`), new leases, and the end of the run (`state.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core.batch import Cut, CutBatches, HeldGroup, cut, cut_with_copies, num_barren, return_behind
from asyncdapo.replay.core.events import Action, CutBatch, GenBatchClosed
from asyncdapo.replay.core.filter import GenBatches
from asyncdapo.replay.core.leases import Leases
from asyncdapo.replay.core.lifecycle import Lifecycle
from asyncdapo.replay.core.recovery import Recovered
from asyncdapo.replay.core.staleness import Patience, StalenessBound
from asyncdapo.replay.core.stream import PromptStream


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


class NextBatch:
    """The one that is being filled. Changed by its methods only; the attributes are for reading."""

    def __init__(
        self,
        config: ReplayConfig,
        filter: FilterConfig,
        *,
        bound: StalenessBound,
        stream: PromptStream,
        prompts: Lifecycle,
        leases: Leases,
        held: Held,
        cut_batches: CutBatches,
        do: Callable[[Action], None],
        was: Recovered,
    ) -> None:
        self._config, self._filter, self._bound, self._do = config, filter, bound, do
        self._stream, self._prompts, self._leases = stream, prompts, leases
        self._held, self._cut_batches = held, cut_batches
        self.gen_batches = GenBatches(filter.gen_batch_multiplier * config.prompts_per_step)
        self.gen_batches.recount(was.next_step, was.gen_batches, was.open_verdicts)
        dropped = was.totals.groups.get("expired", 0) + was.totals.groups.get("withdrawn_stale", 0)
        self.patience = Patience(dropped, was.totals.verdicts)
        self.step, self.wanted = was.next_step, False
        """The train step that it is of; whether the learner asks for it."""
        self.limit_reached = was.limit_reached and self._out_of_gen_batches()
        """The step has used up its generation batches. Its batch is cut short or filled up, or the run ends."""

    def want(self, step: int) -> None:
        """The learner asks for the batch of a step."""
        assert step <= self.step, f"batch {step} wanted before batch {self.step}"
        self.wanted |= step == self.step

    @property
    def num_ready(self) -> int:
        """Groups that it can count on."""
        return self._held.num_ready(self._stream.next)

    @property
    def is_full(self) -> bool:
        return self.num_ready >= self._config.prompts_per_step

    @property
    def is_due(self) -> bool:
        return self.limit_reached or (self.wanted and self.is_full)

    @property
    def is_held_back(self) -> bool:
        if self._config.synchronous:
            return bool(self._leases.running)
        early = self._is_early
        overdue = len(self._leases.overdue(self.step + 1))
        if self._config.on_stale == "auto" and not early:
            return self.patience.waits_for(overdue)
        return (early or self._config.on_stale == "wait") and overdue > 0

    @property
    def _is_early(self) -> bool:
        """The learner still has the batch before, and doesn't wait for this one."""
        return self.step - 1 in self._cut_batches.in_training and not self.limit_reached

    # ------------------------------------------------------------------------------------------------------ groups

    def add(self, group: HeldGroup, *, run_over: bool) -> None:
        """Hold a group that fits, if it is of use, and count its verdict."""
        self.patience.judged += 1
        self.patience.arrived += self.is_due and not self._is_early
        state = self._held.add(group)
        self._prompts.move_both(group, state, reason=group.verdict if state == "filtered" else "")
        self.gen_batches.count(self.step)
        if self.gen_batches.is_full:
            self.close_gen_batch(run_over=run_over)

    def expire(self, group: HeldGroup) -> None:
        """The group doesn't fit."""
        self.patience.dropped += 1
        self._prompts.move_group(group, "expired", reason="stale")
        self._prompts.expire(group.prompt_id)

    def drop_barren(self) -> None:
        """Under `replace`: end a batch's worth of groups if none of them is kept, since there is nothing to copy."""
        self._end_filtered(self._held.take_barren(self._stream.next))

    def close_gen_batch(self, *, run_over: bool) -> None:
        """Close the generation batch. Check whether the step is short of groups and out of generation batches."""
        step, number = self.gen_batches.close()
        reached = not run_over and not self.is_full and self._out_of_gen_batches()
        self._do(GenBatchClosed(step=step, number=number, limit_reached=reached))
        self.limit_reached |= reached

    def _out_of_gen_batches(self) -> bool:
        return 0 < self._filter.max_gen_batches <= self.gen_batches.num_opened

    # --------------------------------------------------------------------------------------------------------- cut

    def cut(self, *, last: bool = False) -> bool:
        """Cut it and begin the next one; False, and nothing changes, if it would have no members. `last`: no batch
        follows, so nothing goes back to the stream."""
        chosen = self._held.cut(self.step, self._stream.next, at_limit=self.limit_reached, last=last)
        if not chosen.members:
            return False
        step, members = self.step, chosen.members
        staleness = tuple(self._bound.check(step, group.min_version, group.group_id) for group in members)
        group_ids = tuple(group.group_id for group in members)
        self._do(CutBatch(step=step, group_ids=group_ids, copies=chosen.copies, staleness=staleness))
        for group in members:
            self._prompts.move_both(group, "cut", step=step)
        self._end_filtered(chosen.filtered)
        for group in chosen.surplus:
            self._prompts.give_back(group)
        self._cut_batches.add(step, members, chosen.copies)
        self._begin(step + 1)
        return True

    def _end_filtered(self, groups: list[HeldGroup]) -> None:
        for group in groups:
            self._prompts.move_both(group, "filtered", reason=group.verdict)

    def _begin(self, step: int) -> None:
        """Begin to fill the batch of `step`, and end whatever would miss the bound in it."""
        if self._config.synchronous and self.gen_batches.is_open:
            ended, number = self.gen_batches.close()
            self._do(GenBatchClosed(step=ended, number=number, limit_reached=False))
        self.gen_batches.next_step()
        self.step, self.wanted, self.limit_reached = step, False, False
        self.patience.arrived = 0
        for lease in self._leases.overdue(step):
            self.patience.dropped += 1
            self._leases.end(lease, "withdrawn", "stale")
            self._prompts.expire(lease.prompt_id)
        self._leases.partials.drop_stale(step)
        for group in self._held.take_stale(self._bound, step):
            self.expire(group)
