"""The pure core of replay: which prompt is leased, which groups make the next batch, and when the run is over.

In: events. Out: actions. No I/O, no clock, no threads, no randomness: the same events give the same actions. The replay
server and the property tests run this code. It starts empty, or from the ledger's record of a former process or of a
rollback (`recovery.py`).

    Ready, WeightsLoaded ──▶ lease ──▶ GroupArrived ──▶ verdict ──▶ queue ──▶ cut ──▶ Trained ──▶ Published
                        ▲         filter.py     │                    │ sweep: what misses batch k + 1 ends
                  admission.py             lifecycle.py      queue.py, batch.py, staleness.py

After every event the state does all that it can: it cuts the batch if it is due, leases while the rule admits, and
stops if the data is used up. Nothing polls. Invariants after every event:

    exactly once   a prompt is in one state and ends once; a lease yields at most one group (`lifecycle.py`)
    staleness      every held group fits the next batch, so every member fits its batch (`staleness.py`)
    admission      no lease was granted against the rule or without a credit of its worker (`admission.py`, `leases.py`)
    batch size     `prompts_per_step`, copies included (`filter.mode: replace`); fewer only under `filter.on_limit:
                   partial | unfiltered`, at the limit or at the data's end
    no silence     an action is possible, or `why_waiting` (`waits.py`) names who is waited for

`run_ahead: 0` runs the same code. Three rules make it a barrier: leases are granted in rising `prompt_id`, the cut
waits until nothing runs, and prompts after the last member go back to the stream. Until the cut a group that the filter
doesn't keep is spare, since its prompt may go back too.

Does not own: payloads, the journal, deadlines, seeds (`server.py`, `journal.py`), and the rules in the files above.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core.admission import Admission
from asyncdapo.replay.core.batch import HeldGroup
from asyncdapo.replay.core.events import (
    Action,
    BatchWanted,
    CloseGenBatch,
    CutBatch,
    Event,
    GenBatchClosed,
    GroupArrived,
    LeaseFailed,
    LeaseLost,
    Published,
    Ready,
    RunEnded,
    SamplingBegan,
    StopRun,
    Trained,
    WeightsLoaded,
    WorkerDrained,
    WorkerJoined,
    WorkerLost,
)
from asyncdapo.replay.core.filter import GenBatches, KeepRate, judge
from asyncdapo.replay.core.leases import Leases
from asyncdapo.replay.core.lifecycle import Lifecycle
from asyncdapo.replay.core.queue import Held
from asyncdapo.replay.core.recovery import Recovered
from asyncdapo.replay.core.staleness import StalenessBound
from asyncdapo.replay.core.stream import PromptStream


class ReplayState:
    """The state machine. Only `handle` changes it; the attributes are for reading.

    `handle` raises ConfigError if a group doesn't have the filter's metric. It raises StalenessError for a batch member
    past the bound, which the invariants rule out.
    """

    def __init__(
        self,
        config: ReplayConfig,
        filter: FilterConfig,
        *,
        max_attempts: int,
        num_prompts: int | None,
        recovered: Recovered | None = None,
        expected_tokens: Callable[[int], float] | None = None,
    ) -> None:
        """`num_prompts`: length of the stream, epochs included; None if it is endless. `expected_tokens`: see
        `PromptStream`. `recovered`: where to resume."""
        self.config, self.filter = config, filter
        size, barrier, was = config.prompts_per_step, config.synchronous, recovered or Recovered()
        self._actions: list[Action] = []
        self._do = self._actions.append
        self.bound = StalenessBound(config.staleness_bound)
        self.keep_rate = KeepRate(size, () if filter.replaces else was.verdicts)
        self.gen_batches = GenBatches(filter.gen_batch_multiplier * size)
        self.gen_batches.recount(was.next_step, was.gen_batches, was.open_verdicts)
        limited = barrier and filter.max_gen_batches > 0
        self.admission = Admission(
            prompts_per_step=size,
            run_ahead=config.run_ahead,
            max_verdicts=filter.max_gen_batches * self.gen_batches.size if limited else math.inf,
        )
        delay, num_fresh, places = 0 if barrier else size, was.num_fresh, was.places
        self.stream = PromptStream(
            num_prompts, delay, num_fresh=num_fresh, places=places, expected_tokens=expected_tokens
        )
        self.prompts = Lifecycle(
            self.stream, max_attempts=max_attempts, on_stale=config.on_stale, do=self._do, prompts=was.prompts
        )
        self.leases = Leases(
            self.bound, do=self._do, workers=was.workers, running=was.leases, num_granted=was.num_leases
        )
        self.held = Held(config, filter, was.queued, was.spare)
        self.untrained = dict(was.batches)
        """Members of each batch that is cut but not trained."""
        self.copies = dict(was.copies)
        """Extra copies of each member, for the batches that have copies."""
        self.in_training = dict(was.in_training)
        """Groups, copies included, of each batch that is cut but whose version isn't published."""

        self.next_step, self.over, self.cut_wanted = was.next_step, was.over, False
        """The train step whose batch is being filled; whether the run is over; whether the learner asks for it."""
        self.limit_reached = was.limit_reached and self._out_of_gen_batches()
        """The step has used up its generation batches. Its batch is cut short or filled up, or the run ends."""

    def handle(self, event: Event) -> list[Action]:
        """Apply one event, then do all that it makes possible. Returns the actions, in order."""
        self._actions.clear()
        self._take_in(event)
        if not self.over:
            self._cut_if_due()
        if not self.over:
            self._drop_barren()
            self._grant_leases()
        return list(self._actions)

    def _take_in(self, event: Event) -> None:
        match event:
            case WorkerJoined():
                self.leases.join(event.worker, event.loaded_version)
            case WorkerLost():
                for lease in self.leases.leave(event.worker, "lost", "worker lost"):
                    self.prompts.lose(lease.prompt_id, "worker lost")
            case WorkerDrained():
                for lease in self.leases.leave(event.worker, "withdrawn", "drained"):
                    self.prompts.hand_back(lease.prompt_id, "drained")
            case Ready():
                self.leases.note_ready(event.worker, event.credits, event.pace)
            case WeightsLoaded():
                self.leases.workers[event.worker].loaded_version = event.version
            case SamplingBegan():
                self.leases.start(event.lease_id, event.version)
            case GroupArrived():
                self._accept_group(event)
            case LeaseFailed():
                if lease := self.leases.end_if_running(event.lease_id, "failed", "reward"):
                    self.prompts.move(lease.prompt_id, "failed", reason="reward")
            case LeaseLost():
                self._lose_lease(event)
            case CloseGenBatch():
                self.gen_batches.open(self.next_step)
                self._close_gen_batch()
            case BatchWanted():
                assert event.step <= self.next_step, f"batch {event.step} wanted before batch {self.next_step}"
                self.cut_wanted |= event.step == self.next_step
            case Trained():
                self.copies.pop(event.step, None)
                for group in self.untrained.pop(event.step):
                    self.prompts.move_both(group, "trained", step=event.step)
            case Published():
                self.in_training = {step: size for step, size in self.in_training.items() if step > event.version}
            case RunEnded():
                self._end_run()
            case _:
                raise TypeError(f"not an event of replay: {event!r}")

    # ------------------------------------------------------------------------------------------------------ leases

    def num_ready(self) -> int:
        """Groups that the next batch can count on."""
        return self.held.num_ready(self.stream.next)

    def admits(self) -> bool:
        """Whether one more lease is admitted."""
        return self.admission.admits(
            in_training=sum(self.in_training.values()),
            queued=self.num_ready(),
            running=len(self.leases.running),
            keep_rate=self.keep_rate.value,
            verdicts=sum(map(len, self.held.ahead_of(self.stream.next))),
        )

    def _grant_leases(self) -> None:
        # A lease granted while a due cut is held can't be in that batch, and must not hold it longer.
        step = self.next_step + self._cut_is_due()
        while self.stream.next is not None and self.admits():
            worker = self.leases.worker_for_next(step)
            if worker is None:
                return
            prompt_id = self.stream.take()
            self.leases.grant(prompt_id, worker, self.prompts.next_attempt(prompt_id))
            self.prompts.move(prompt_id, "leased")

    def _lose_lease(self, event: LeaseLost) -> None:
        if lease := self.leases.running.get(event.lease_id):
            self.leases.end(lease, "rejected" if event.reason == "rejected" else "lost", event.reason)
            self.prompts.lose(lease.prompt_id, event.reason)

    # ------------------------------------------------------------------------------------------------------ groups

    def _accept_group(self, event: GroupArrived) -> None:
        lease = self.leases.end_if_running(event.lease_id, "done")
        if lease is None:
            return
        group = HeldGroup(
            min_version=event.min_version,
            prompt_id=lease.prompt_id,
            group_id=lease.lease_id,
            verdict=judge(self.filter, event.metrics, event.num_loss_tokens),
        )
        if not self.bound.fits(group.min_version, self.next_step):
            self._expire_group(group)
            return
        state = self.held.add(group)
        self.prompts.move_both(group, state, reason=group.verdict if state == "filtered" else "")
        if not self.filter.replaces:  # under `replace` every group has a place in a batch
            self.keep_rate.count(group.verdict)
        self.gen_batches.count(self.next_step)
        if self.gen_batches.is_full:
            self._close_gen_batch()

    def _expire_group(self, group: HeldGroup) -> None:
        self.prompts.move_group(group, "expired", reason="stale")
        self.prompts.expire(group.prompt_id)

    def _close_gen_batch(self) -> None:
        """Close the generation batch. Check whether the step is short of groups and out of generation batches."""
        step, number = self.gen_batches.close()
        short = not self.over and self.num_ready() < self.config.prompts_per_step
        reached = short and self._out_of_gen_batches()
        self._do(GenBatchClosed(step=step, number=number, limit_reached=reached))
        self.limit_reached |= reached

    def _out_of_gen_batches(self) -> bool:
        return 0 < self.filter.max_gen_batches <= self.gen_batches.num_opened

    # --------------------------------------------------------------------------------------------------------- cut

    def _cut_if_due(self) -> None:
        if self.limit_reached and self.filter.on_limit == "raise":
            self._stop_at_limit()
        elif self._cut_is_due():
            if not self._leases_before_cut():
                self._cut()
        elif self.cut_wanted and self.stream.next is None and not self.leases.running:
            self._finish_data()

    def _cut_is_due(self) -> bool:
        """Whether to cut: the learner wants the batch and it is full, or the step has reached its limit."""
        return self.limit_reached or (self.cut_wanted and self.num_ready() >= self.config.prompts_per_step)

    def _leases_before_cut(self) -> bool:
        """Hold a due cut. `run_ahead: 0`: until nothing runs. Otherwise for leases that it would make stale, if
        `on_stale: wait` or the learner still has the batch before."""
        if self.config.synchronous:
            return bool(self.leases.running)
        early = self.next_step - 1 in self.in_training and not self.limit_reached
        return (early or self.config.on_stale == "wait") and bool(self.leases.overdue(self.next_step + 1))

    def _cut(self, *, last: bool = False) -> None:
        """Cut the next batch. `last`: no batch follows, so nothing goes back to the stream."""
        chosen = self.held.cut(self.next_step, self.stream.next, at_limit=self.limit_reached, last=last)
        if not chosen.members:
            self._stop_at_limit()
            return
        step, members = self.next_step, chosen.members
        staleness = tuple(self.bound.check(step, group.min_version, group.group_id) for group in members)
        group_ids = tuple(group.group_id for group in members)
        self._do(CutBatch(step=step, group_ids=group_ids, copies=chosen.copies, staleness=staleness))
        for group in members:
            self.prompts.move_both(group, "cut", step=step)
        self._filter(chosen.filtered)
        for group in chosen.surplus:
            self.prompts.give_back(group)
        self.untrained[step], self.in_training[step] = members, len(members) + sum(chosen.copies)
        if chosen.copies:
            self.copies[step] = chosen.copies
        self._begin_step(step + 1)

    def _filter(self, groups: list[HeldGroup]) -> None:
        for group in groups:
            self.prompts.move_both(group, "filtered", reason=group.verdict)

    def _drop_barren(self) -> None:
        """Under `replace`: end a batch's worth of groups if none of them is kept, since there is nothing to copy."""
        self._filter(self.held.take_barren(self.stream.next))

    def _begin_step(self, step: int) -> None:
        """Begin to fill the batch of `step`, and end whatever would miss the bound in it."""
        if self.config.synchronous and self.gen_batches.is_open:
            ended, number = self.gen_batches.close()
            self._do(GenBatchClosed(step=ended, number=number, limit_reached=False))
        self.gen_batches.next_step()
        self.next_step, self.cut_wanted, self.limit_reached = step, False, False
        for lease in self.leases.overdue(step):
            self.leases.end(lease, "withdrawn", "stale")
            self.prompts.expire(lease.prompt_id)
        for group in self.held.take_stale(self.bound, step):
            self._expire_group(group)

    # --------------------------------------------------------------------------------------------------------- end

    def _finish_data(self) -> None:
        """No prompt waits, nothing runs, and the batch isn't full: cut a last short one, or end the run."""
        if self.filter.on_limit == "partial" and self.held.queued:
            self._cut(last=True)
        elif not self.untrained:
            self._stop(f"the data is used up: {len(self.held.queued)} kept groups are left", error=False)

    def _stop_at_limit(self) -> None:
        limit, size, num_ready = self.filter.max_gen_batches, self.config.prompts_per_step, self.num_ready()
        self._stop(
            f"filter.max_gen_batches: {limit} generation batches gave {num_ready} of the {size} groups that step "
            f"{self.next_step} needs (prompts of another difficulty, room for longer answers if reward.overlong_filter "
            "masks them, a higher limit, or filter.on_limit)",
            error=True,
        )

    def _stop(self, reason: str, *, error: bool) -> None:
        self.over = True
        self._do(StopRun(reason=reason, error=error))

    def _end_run(self) -> None:
        """Every prompt without an end becomes `unused`; running leases are withdrawn."""
        self.over = True
        for lease in list(self.leases.running.values()):
            self.leases.end(lease, "withdrawn", "run ended")
        for step, groups in [(None, self.held.take_all()), *self.untrained.items()]:
            for group in groups:
                self.prompts.move_group(group, "surplus", step=step, reason="run ended")
        for prompt_id in self.prompts.unended:
            self.prompts.move(prompt_id, "unused", reason="run ended")
        self.untrained, self.copies = {}, {}
