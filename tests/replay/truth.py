"""An independent account of a replay run, rebuilt from the events that went in and the actions that came out.

It shares no code with the core beyond the records, and it takes nothing for granted: every action is checked against
what the events so far allow, and after every event the whole account is checked for what must hold and for what should
have been done by now. The rules are written down here a second time, in the plainest way, at any cost of time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from asyncdapo.replay import events as core
from asyncdapo.replay.config import FilterConfig, ReplayConfig

LEGAL_MOVES = {
    "waiting": {"leased", "unused"},
    "leased": {"queued", "spare", "filtered", "expired", "failed", "waiting", "unused"},
    "queued": {"cut", "expired", "failed", "waiting", "unused"},
    "spare": {"cut", "filtered", "waiting", "unused"},
    "cut": {"trained", "unused"},
}


@dataclass
class TrueLease:
    prompt_id: int
    worker: int
    started_version: int | None = None


@dataclass
class TrueGroup:
    prompt_id: int
    min_version: int
    verdict: str
    state: str = "arrived"


class Truth:
    """Feed it `observe(event, actions)`; it raises AssertionError at the first breach."""

    def __init__(
        self, config: ReplayConfig, filter: FilterConfig, *, max_attempts: int, num_prompts: int | None
    ) -> None:
        self.config, self.filter = config, filter
        self.size = config.prompts_per_step
        self.barrier = config.run_ahead == 0
        self.bound = 0 if self.barrier else config.max_staleness
        self.max_attempts, self.num_prompts = max_attempts, num_prompts

        self.prompts: dict[int, str] = {}
        self.attempts: Counter[int] = Counter()
        self.places: dict[int, int] = {}
        self.lost: set[int] = set()
        self.leases: dict[int, TrueLease] = {}
        self.ended_leases: set[int] = set()
        self.groups: dict[int, TrueGroup] = {}
        self.credits: dict[int, int] = {}
        self.loaded: dict[int, int] = {}
        self.verdicts: list[bool] = []

        self.num_cut = 0
        self.batches: dict[int, list[int]] = {}
        self.trained: set[int] = set()
        self.published = 0
        self.wanted = 0
        self.at_limit = False
        self.over = False

        self.gen_batch_step, self.gen_batch_number, self.gen_batch_verdicts = 0, 0, 0
        self.gen_batches_of_step = 0

    # ------------------------------------------------------------------------------------------------- what is so

    @property
    def next_step(self) -> int:
        return self.num_cut + 1

    @property
    def num_fresh(self) -> int:
        return len(self.prompts)

    def fits(self, version: int, step: int) -> bool:
        return (step - 1) - version <= self.bound

    def in_state(self, state: str) -> list[int]:
        return [group_id for group_id, group in self.groups.items() if group.state == state]

    def next_prompt(self) -> int | None:
        """Lowest place in the stream: own id, or behind the next batch's worth for the prompt of a lost lease."""
        candidates = [(self.places[p], p) for p, state in self.prompts.items() if state == "waiting"]
        if self.num_prompts is None or self.num_fresh < self.num_prompts:
            candidates.append((self.num_fresh, self.num_fresh))
        return min(candidates)[1] if candidates else None

    def num_ready(self) -> int:
        """Kept groups of the next batch; at the barrier only those before the next prompt of the stream."""
        queued, before = self.in_state("queued"), self.next_prompt()
        if self.barrier and before is not None:
            queued = [group_id for group_id in queued if self.groups[group_id].prompt_id < before]
        return len(queued)

    def in_training(self) -> int:
        return sum(len(members) for step, members in self.batches.items() if step > self.published)

    def keep_rate(self) -> float:
        latest = self.verdicts[-4 * self.size :]
        return max(0.1, (4 + sum(latest)) / (4 + len(latest)))

    def admits(self) -> bool:
        ahead = self.in_training() + self.num_ready() + self.keep_rate() * len(self.leases)
        verdicts = len(self.in_state("queued")) + len(self.in_state("spare"))
        limit = self.filter.max_gen_batches * self.filter.gen_batch_multiplier * self.size
        if self.barrier and limit and verdicts + len(self.leases) >= limit:
            return False
        return ahead < (self.config.run_ahead + 1) * self.size

    def lease_version(self, lease: TrueLease) -> int:
        return self.loaded[lease.worker] if lease.started_version is None else lease.started_version

    def held_back(self) -> bool:
        """Whether a cut would have to wait for running leases."""
        if self.barrier:
            return bool(self.leases)
        late = [lease for lease in self.leases.values() if not self.fits(self.lease_version(lease), self.next_step + 1)]
        return self.config.on_stale == "wait" and bool(late)

    def cut_is_due(self) -> bool:
        return self.at_limit or (self.wanted == self.next_step and self.num_ready() >= self.size)

    def able_workers(self) -> list[int]:
        """Workers with a credit and weights for the next batch (for the one after it, if its cut is held back)."""
        step = self.next_step + self.cut_is_due()
        return [w for w in self.loaded if self.credits[w] > 0 and self.fits(self.loaded[w], step)]

    # ---------------------------------------------------------------------------------------------------- observe

    def observe(self, event: core.Event, actions: Sequence[core.Action]) -> None:
        answered = self._see_event(event)
        cuts = [action for action in actions if isinstance(action, core.CutBatch)]
        for index, action in enumerate(actions):
            match action:
                case core.GrantLease():
                    self._see_grant(action)
                case core.EndLease():
                    self._see_lease_end(action, event, answered)
                case core.MoveGroup():
                    self._see_group_move(action, event)
                case core.MovePrompt():
                    self._see_prompt_move(action, event)
                case core.CutBatch():
                    self._see_cut(action)
                case core.GenBatchClosed():
                    self._see_gen_batch_closed(action, at_cut=bool(cuts) and self.barrier)
                case core.StopRun():
                    self._see_stop(action)
                    assert index == len(actions) - 1, "the run stops last"
        assert len(cuts) <= 1
        self.check()

    def check(self) -> None:
        self._check_exactly_once()
        self._check_staleness()
        self._check_nothing_left_undone()

    def _see_event(self, event: core.Event) -> bool:
        """Returns whether the event answers a running lease."""
        match event:
            case core.WorkerJoined():
                self.loaded[event.worker], self.credits[event.worker] = event.loaded_version, 0
            case core.WorkerLost():
                del self.loaded[event.worker], self.credits[event.worker]
            case core.Ready():
                self.credits[event.worker] = event.credits
            case core.Loaded():
                self.loaded[event.worker] = event.version
            case core.Started() if event.lease_id in self.leases:
                self.leases[event.lease_id].started_version = event.version
            case core.GroupDone() if event.lease_id in self.leases:
                prompt_id = self.leases[event.lease_id].prompt_id
                group = TrueGroup(prompt_id, event.min_version, self._verdict(event))
                self.groups[event.lease_id] = group
                if self.fits(event.min_version, self.next_step):
                    self._count_verdict(group.verdict == "kept")
                return True
            case core.LeaseFailed() | core.LeaseLost():
                return event.lease_id in self.leases
            case core.CutWanted():
                self.wanted = max(self.wanted, event.step)
            case core.Trained():
                self.trained.add(event.step)
            case core.Published():
                self.published = max(self.published, event.version)
            case core.RunEnded():
                self.over = True
        return False

    def _verdict(self, event: core.GroupDone) -> str:
        if not self.filter.enabled:
            return "kept"
        if not event.num_loss_tokens:
            return "masked"
        values = sorted(event.metrics[self.filter.metric])
        return "kept" if values[-1] - values[0] > 1e-6 else "constant"

    def _count_verdict(self, kept: bool) -> None:
        self.verdicts.append(kept)
        if self.gen_batch_verdicts == 0:
            self.gen_batches_of_step += 1
            self.gen_batch_step, self.gen_batch_number = self.next_step, self.gen_batches_of_step
        self.gen_batch_verdicts += 1

    # ---------------------------------------------------------------------------------------------------- actions

    def _see_grant(self, action: core.GrantLease) -> None:
        assert not self.over, "no lease after the end"
        assert action.lease_id not in self.leases.keys() | self.ended_leases, "a lease id is never used again"
        assert self.admits(), "granted against the admission rule"
        assert action.worker in self.able_workers(), "granted without a credit, or to weights that don't fit"
        assert action.prompt_id == self.next_prompt(), "not the next prompt of the stream"
        assert action.attempt == self.attempts[action.prompt_id] + 1 <= self.max_attempts
        self.credits[action.worker] -= 1
        self.leases[action.lease_id] = TrueLease(action.prompt_id, action.worker)

    def _see_lease_end(self, action: core.EndLease, event: core.Event, answered: bool) -> None:
        if action.outcome == "late":
            assert isinstance(event, core.GroupDone | core.LeaseFailed)
            assert not answered
            assert action.lease_id == event.lease_id
            return
        lease = self.leases.pop(action.lease_id)
        self.ended_leases.add(action.lease_id)
        assert (action.prompt_id, action.worker) == (lease.prompt_id, lease.worker)
        match event:
            case core.GroupDone() if action.lease_id == event.lease_id:
                assert action.outcome == "done"
                return
            case core.LeaseFailed() if action.lease_id == event.lease_id:
                assert action.outcome == "failed"
                return
            case core.LeaseLost() if action.lease_id == event.lease_id:
                assert action.outcome == ("rejected" if event.reason == "rejected" else "lost")
                self._lose(lease)
                return
            case core.WorkerLost() if action.worker == event.worker:
                assert action.outcome == "lost"
                self._lose(lease)
                return
        assert action.outcome == "withdrawn"
        if not isinstance(event, core.RunEnded):
            assert not self.fits(self.lease_version(lease), self.next_step), "withdrawn though it could still make it"
            self.attempts[lease.prompt_id] += self.config.on_stale == "requeue"

    def _lose(self, lease: TrueLease) -> None:
        self.attempts[lease.prompt_id] += 1
        self.lost.add(lease.prompt_id)

    def _see_group_move(self, action: core.MoveGroup, event: core.Event) -> None:
        group = self.groups[action.group_id]
        assert action.prompt_id == group.prompt_id
        if group.state == "arrived":
            assert isinstance(event, core.GroupDone)
            assert action.state == self._first_state(group)
        else:
            legal = {
                "queued": {"cut", "expired", "surplus"},
                "spare": {"cut", "filtered", "surplus"},
                "cut": {"trained", "surplus"},
            }
            assert action.state in legal[group.state], f"{group.state} -> {action.state}"
        if action.state == "surplus":
            assert self.over or self.barrier
        if action.state == "expired":
            assert not self.fits(group.min_version, self.next_step), "expired though it fits"
            self.attempts[group.prompt_id] += self.config.on_stale == "requeue"
        group.state = action.state

    def _first_state(self, group: TrueGroup) -> str:
        if not self.fits(group.min_version, self.next_step):
            return "expired"
        if group.verdict == "kept":
            return "queued"
        fills = self.filter.max_gen_batches and self.filter.on_limit == "unfiltered" and group.verdict == "constant"
        return "spare" if self.barrier or fills else "filtered"

    def _see_prompt_move(self, action: core.MovePrompt, event: core.Event) -> None:
        prompt_id = action.prompt_id
        before = self.prompts.get(prompt_id, "waiting")
        assert action.state in LEGAL_MOVES.get(before, ()), f"prompt {prompt_id}: {before} -> {action.state}"
        assert action.attempts == self.attempts[prompt_id]
        used_up = action.attempts >= self.max_attempts
        if action.state == "waiting":
            assert not used_up
            behind = prompt_id in self.lost and not self.barrier
            self.places[prompt_id] = self.num_fresh + self.size if behind else prompt_id
        if action.state == "failed":
            assert used_up or isinstance(event, core.LeaseFailed)
        if action.state == "expired":
            assert self.config.on_stale != "requeue"
        if action.state == "unused":
            assert isinstance(event, core.RunEnded)
        self.lost.discard(prompt_id)
        self.prompts[prompt_id] = action.state

    def _see_cut(self, action: core.CutBatch) -> None:
        assert not self.over
        assert action.step == self.next_step
        assert self.wanted == action.step or self.at_limit, "nobody asked"
        assert not self.held_back(), "the cut had to wait"
        members = [self.groups[group_id] for group_id in action.group_ids]
        prompt_ids = [group.prompt_id for group in members]
        assert prompt_ids == sorted(set(prompt_ids)), "members in rising prompt_id, none twice"
        ages = tuple((action.step - 1) - group.min_version for group in members)
        assert ages == action.staleness
        assert all(0 <= age <= self.bound for age in ages), "staleness past the bound"

        in_order = sorted(self.in_state("queued"), key=lambda i: (self.groups[i].min_version, self.groups[i].prompt_id))
        expected = in_order[: self.size]
        if self.at_limit and self.filter.on_limit == "unfiltered":
            constant = [i for i in self.in_state("spare") if self.groups[i].verdict == "constant"]
            constant.sort(key=lambda i: (self.groups[i].min_version, self.groups[i].prompt_id))
            expected += constant[: self.size - len(expected)]
        assert set(action.group_ids) == set(expected), "not the first of the queue"
        if len(members) != self.size:
            assert 0 < len(members) < self.size
            used_up = self.next_prompt() is None and not self.leases and self.filter.on_limit == "partial"
            assert used_up or (self.at_limit and self.filter.on_limit in ("partial", "unfiltered")), "a short batch"
        self.num_cut, self.at_limit = action.step, False
        self.batches[action.step] = list(action.group_ids)
        self.gen_batches_of_step = 0

    def _see_gen_batch_closed(self, action: core.GenBatchClosed, *, at_cut: bool) -> None:
        size = self.filter.gen_batch_multiplier * self.size
        assert (action.step, action.number) == (self.gen_batch_step, self.gen_batch_number)
        assert self.gen_batch_verdicts == size or (at_cut and 0 < self.gen_batch_verdicts < size)
        full, self.gen_batch_verdicts = self.gen_batch_verdicts == size, 0
        out = 0 < self.filter.max_gen_batches <= self.gen_batches_of_step
        if full and out and self.num_ready() < self.size and not self.over:
            self.at_limit = True

    def _see_stop(self, action: core.StopRun) -> None:
        assert not self.over, "stopped twice"
        assert action.reason
        if action.error:
            assert self.at_limit
            constant = [i for i in self.in_state("spare") if self.groups[i].verdict == "constant"]
            nothing = not self.in_state("queued") and (self.filter.on_limit == "partial" or not constant)
            assert self.filter.on_limit == "raise" or nothing
        else:
            assert self.next_prompt() is None
            assert not self.leases
            assert self.num_ready() < self.size
            assert self.trained == set(self.batches), "a batch is still being trained on"
        self.over = True

    # ------------------------------------------------------------------------------------------------ after an event

    def _check_exactly_once(self) -> None:
        assert sorted(self.prompts) == list(range(len(self.prompts))), "a prompt of the stream was left out"
        leased = sorted(lease.prompt_id for lease in self.leases.values())
        assert leased == sorted(p for p, state in self.prompts.items() if state == "leased")
        for state in ("queued", "spare", "cut", "trained", "filtered"):
            held = sorted(self.groups[i].prompt_id for i in self.in_state(state))
            assert held == sorted(p for p, s in self.prompts.items() if s == state), state
        members = [group_id for batch in self.batches.values() for group_id in batch]
        assert len(members) == len(set(members))
        assert all(count >= 0 for count in self.credits.values())
        assert not self.in_state("arrived"), "a group is nowhere"
        if not self.over:
            assert sorted(self.in_state("trained")) == sorted(i for step in self.trained for i in self.batches[step])

    def _check_staleness(self) -> None:
        if self.over:
            return
        versions = [self.groups[i].min_version for state in ("queued", "spare") for i in self.in_state(state)]
        versions += [self.lease_version(lease) for lease in self.leases.values()]
        assert all(self.fits(version, self.next_step) for version in versions), "something can't make the next batch"

    def _check_nothing_left_undone(self) -> None:
        """What the rules call for has been done: nothing waits for another event that needn't."""
        if self.over:
            return
        assert self.gen_batch_verdicts < self.filter.gen_batch_multiplier * self.size, "a generation batch is full"
        assert not self.cut_is_due() or self.held_back(), "a due cut was not made"
        could_lease = self.next_prompt() is not None and self.admits() and self.able_workers()
        assert not could_lease, "a lease could be granted"
