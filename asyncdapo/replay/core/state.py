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
from dataclasses import replace

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core.admission import Admission, Pacing
from asyncdapo.replay.core.batch import CutBatches, HeldGroup
from asyncdapo.replay.core.events import (
    Action,
    BatchWanted,
    CloseGenBatch,
    Event,
    GroupArrived,
    LeaseFailed,
    LeaseHandedBack,
    LeaseLost,
    PartialSaved,
    PartialUnreadable,
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
from asyncdapo.replay.core.filter import KeepRate, judge
from asyncdapo.replay.core.leases import Leases
from asyncdapo.replay.core.lifecycle import Lifecycle
from asyncdapo.replay.core.queue import Held, NextBatch
from asyncdapo.replay.core.recovery import Recovered
from asyncdapo.replay.core.staleness import StalenessBound
from asyncdapo.replay.core.stream import PromptStream, SolvedRows


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
        solved: SolvedRows | None = None,
    ) -> None:
        """`num_prompts`: length of the stream, epochs included; None if it is endless. `expected_tokens`: see
        `PromptStream`. `solved`: rows to leave out. `recovered`: where to resume."""
        self.config, self.filter = config, filter
        size, barrier, was = config.prompts_per_step, config.synchronous, recovered or Recovered()
        self._actions: list[Action] = []
        self._do = self._actions.append
        self.bound = StalenessBound(config.staleness_bound)
        self.keep_rate = KeepRate(size, () if filter.replaces else was.verdicts)
        delay, num_fresh, places = 0 if barrier else size, was.num_fresh, was.places
        self.stream = PromptStream(
            num_prompts, delay, num_fresh=num_fresh, places=places, expected_tokens=expected_tokens
        )
        self.leases = Leases(self.bound, self._do, was)
        end_partial = self.leases.partials.drop
        self.prompts = Lifecycle(self.stream, was.prompts, self._do, end_partial, max_attempts, config.on_stale)
        self.held = Held(config, filter, was.queued, was.spare)
        self.cut_batches = CutBatches(was.batches, was.copies, was.in_training)
        self.next_batch = NextBatch(
            config,
            filter,
            bound=self.bound,
            stream=self.stream,
            prompts=self.prompts,
            leases=self.leases,
            held=self.held,
            cut_batches=self.cut_batches,
            do=self._do,
            was=was,
        )
        limited = barrier and filter.max_gen_batches > 0
        self.pacing = Pacing(config, was.measured)
        self.admission = Admission(
            prompts_per_step=size,
            run_ahead=self.pacing.run_ahead,
            max_verdicts=filter.max_gen_batches * self.next_batch.gen_batches.size if limited else math.inf,
        )
        self.solved, self.over = solved, was.over

    def handle(self, event: Event) -> list[Action]:
        """Apply one event, then do all that it makes possible. Returns the actions, in order."""
        self._actions.clear()
        self._take_in(event)
        self._retire()
        if not self.over:
            self._cut_if_due()
        if not self.over:
            self.next_batch.drop_barren()
            self._grant_leases()
            self.pacing.note(self._ahead(len(self.leases.running) + self.leases.num_credits))
        return list(self._actions)

    def _take_in(self, event: Event) -> None:
        match event:
            case WorkerJoined():
                self.leases.join(event.worker, event.loaded_version, event.continues)
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
            case PartialSaved():
                self.leases.save(event.lease_id, event.partial, self.next_batch.step)
            case PartialUnreadable():
                self.leases.partials.drop(event.prompt_id, "unreadable")
            case LeaseHandedBack():
                if lease := self.leases.running.get(event.lease_id):
                    self.leases.end(lease, "withdrawn", "handed back", keep=True)
                    self.prompts.hand_back(lease.prompt_id, "handed back")
            case CloseGenBatch():
                self.next_batch.gen_batches.open(self.next_batch.step)
                self.next_batch.close_gen_batch(run_over=self.over)
            case BatchWanted():
                self.next_batch.want(event.step)
            case Trained():
                for group in self.cut_batches.train(event.step):
                    self.prompts.move_both(group, "trained", step=event.step)
            case Published():
                self._measure_pace(event.version)
                self.cut_batches.publish(event.version)
            case RunEnded():
                self._end_run()
            case _:
                raise TypeError(f"not an event of replay: {event!r}")

    # ------------------------------------------------------------------------------------------------------ leases

    def admits(self) -> bool:
        """Whether one more lease is admitted."""
        return self.admission.admits(
            in_training=self.cut_batches.num_groups,
            queued=self.next_batch.num_ready,
            running=len(self.leases.running),
            keep_rate=self.keep_rate.value,
            verdicts=sum(map(len, self.held.ahead_of(self.stream.next))),
        )

    def _grant_leases(self) -> None:
        # A lease granted while a due cut is held can't be in that batch, and must not hold it longer.
        step = self.next_batch.step + self.next_batch.is_due
        while self.leases.num_credits and self.stream.next is not None and self.admits():
            worker = self.leases.worker_for_next(step)
            if worker is None:
                return
            prompt_id = self.stream.take()
            self.leases.grant(prompt_id, worker, self.prompts.next_attempt(prompt_id), step)
            self.prompts.move(prompt_id, "leased")
            self._retire()

    def _retire(self) -> None:
        """End the next prompts as long as the model has solved their rows. If that is so of all, the run ends."""
        solved = self.solved
        if solved is None or self.over or not solved.num_retired:
            return
        if solved.num_retired == solved.num_rows:
            problem = f"all {solved.num_rows:,} rows were solved above {solved.above:g} in two epochs"
            self._stop(f"prompts.retire_above: {problem} (harder prompts, a higher share, or null)", error=True)
            return
        while (prompt_id := self.stream.next) is not None and solved.retires(prompt_id):
            self.prompts.move(self.stream.take(), "retired", reason="solved")

    def _ahead(self, running: int) -> float:
        """Groups that would be ahead of the learner with so many leases."""
        return self.cut_batches.num_groups + self.next_batch.num_ready + self.keep_rate.value * running

    def _measure_pace(self, version: int) -> None:
        """The learner is about to want the batch after this version."""
        ready = self.cut_batches.in_training.get(version + 1, 0) + self.next_batch.num_ready
        if measured := self.pacing.end_step(version, ready):
            self.admission = replace(self.admission, run_ahead=measured.run_ahead)
            self._do(measured)

    def _lose_lease(self, event: LeaseLost) -> None:
        if lease := self.leases.running.get(event.lease_id):
            rejected = event.reason == "rejected"
            self.leases.end(lease, "rejected" if rejected else "lost", event.reason, keep=not rejected)
            self.prompts.lose(lease.prompt_id, event.reason)

    # ------------------------------------------------------------------------------------------------------ groups

    def _accept_group(self, event: GroupArrived) -> None:
        lease = self.leases.end_if_running(event.lease_id, "done")
        if lease is None:
            return
        if self.solved and (accs := event.metrics.get("acc")):
            self.solved.note(lease.prompt_id, sum(accs) / len(accs))
        group = HeldGroup(
            min_version=event.min_version,
            prompt_id=lease.prompt_id,
            group_id=lease.lease_id,
            verdict=judge(self.filter, event.metrics, event.num_loss_tokens),
        )
        if not self.bound.fits(group.min_version, self.next_batch.step):
            self.next_batch.expire(group)
            return
        if not self.filter.replaces:  # under `replace` every group has a place in a batch
            self.keep_rate.count(group.verdict)
        self.next_batch.add(group, run_over=self.over)

    # --------------------------------------------------------------------------------------------------------- cut

    def _cut_if_due(self) -> None:
        batch = self.next_batch
        if batch.limit_reached and self.filter.on_limit == "raise":
            self._stop_at_limit()
        elif batch.is_due:
            if not (batch.is_held_back or batch.cut()):
                self._stop_at_limit()
        elif batch.wanted and self.stream.next is None and not self.leases.running:
            self._finish_data()

    def _finish_data(self) -> None:
        """No prompt waits, nothing runs, and the batch isn't full: cut a last short one, or end the run."""
        num_kept = len(self.held.queued)
        if self.filter.on_limit == "partial" and num_kept:
            self.next_batch.cut(last=True)
        elif not self.cut_batches.untrained:
            self._stop(f"the data is used up: {num_kept} kept groups are left", error=False)

    def _stop_at_limit(self) -> None:
        limit, size = self.filter.max_gen_batches, self.config.prompts_per_step
        self._stop(
            f"filter.max_gen_batches: {limit} generation batches gave {self.next_batch.num_ready} of the {size} groups "
            f"that step {self.next_batch.step} needs (prompts of another difficulty, room for longer answers if "
            "reward.overlong_filter masks them, a higher limit, or filter.on_limit)",
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
        for step, groups in [(None, self.held.take_all()), *self.cut_batches.take_all().items()]:
            for group in groups:
                self.prompts.move_group(group, "surplus", step=step, reason="run ended")
        for prompt_id in self.prompts.unended:
            self.prompts.move(prompt_id, "unused", reason="run ended")
