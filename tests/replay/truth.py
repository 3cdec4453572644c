"""An independent judge of a replay run, from the events that went in and the actions that came out.

It takes nothing for granted: every action is checked against what the events so far allow, and after every event the
whole account is checked for what must hold and for what should have been done by now.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncdapo.replay.core import events as core
from tests.replay.account import Account, TrueGroup, TrueLease

LEGAL_MOVES = {
    "waiting": {"leased", "unused"},
    "leased": {"queued", "spare", "filtered", "expired", "failed", "waiting", "unused"},
    "queued": {"cut", "expired", "failed", "waiting", "unused"},
    "spare": {"cut", "filtered", "expired", "failed", "waiting", "unused"},
    "cut": {"trained", "unused"},
}


class Truth(Account):
    """Feed it `observe(event, actions)`; it raises AssertionError at the first breach."""

    def observe(self, event: core.Event, actions: Sequence[core.Action]) -> None:
        answered = self.see_event(event)
        self.dropped: set[int] = set()
        """Spare groups that this event ends as `filtered`."""
        self.filtered_at_cut: set[int] = set()
        cuts = [action for action in actions if isinstance(action, core.CutBatch)]
        self.released: dict[int, core.Partial] = {}
        """By prompt: what is dropped with its lease, which must end next."""
        before = dict(self.partials)
        for index, action in enumerate(actions):
            match action:
                case core.GrantLease():
                    self._see_grant(action)
                case core.EndLease():
                    self._see_lease_end(action, event, answered)
                case core.SavePartial():
                    self._see_saved(action, event)
                case core.DropPartial():
                    self._see_dropped(action, event)
                case core.MoveGroup():
                    self._see_group_move(action, event)
                case core.MovePrompt():
                    self._see_prompt_move(action, event)
                case core.CutBatch():
                    self._see_cut(action)
                case core.GenBatchClosed():
                    self._see_gen_batch_closed(action, at_cut=bool(cuts) and self.barrier)
                case core.PaceMeasured():
                    self._see_pace(action, event)
                case core.StopRun():
                    self._see_stop(action)
                    assert index == len(actions) - 1, "the run stops last"
        assert len(cuts) <= 1
        self._check_dropped()
        if isinstance(event, core.PartialSaved):
            self._check_saved(event, before)
        self.check()

    def check(self) -> None:
        self.check_partials()
        self._check_exactly_once()
        self._check_staleness()
        self._check_nothing_left_undone()

    # ---------------------------------------------------------------------------------------------------- actions

    def _see_grant(self, action: core.GrantLease) -> None:
        assert not self.over, "no lease after the end"
        assert action.lease_id not in self.leases.keys() | self.ended_leases, "a lease id is never used again"
        assert self.admits(), "granted against the admission rule"
        assert action.worker in self.able_workers(), "granted without a credit, or to weights that don't fit"
        assert action.prompt_id == self.next_prompt(), "not the next prompt of the stream"
        assert action.attempt == self.attempts[action.prompt_id] + 1 <= self.max_attempts
        assert action.num_begun == self.num_saved(action.prompt_id)
        assert not action.num_begun or action.worker in self.continuing
        self.credits[action.worker] -= 1
        self.leases[action.lease_id] = TrueLease(action.prompt_id, action.worker)

    def _see_lease_end(self, action: core.EndLease, event: core.Event, answered: bool) -> None:
        if action.outcome == "late":
            assert isinstance(event, core.GroupArrived | core.LeaseFailed)
            assert not answered
            assert action.lease_id == event.lease_id
            return
        lease = self.leases.pop(action.lease_id)
        self.ended_leases.add(action.lease_id)
        assert (action.prompt_id, action.worker) == (lease.prompt_id, lease.worker)
        self._see_kept(action)
        match event:
            case core.GroupArrived() if action.lease_id == event.lease_id:
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
        if isinstance(event, core.WorkerDrained) and action.worker == event.worker:
            return
        if isinstance(event, core.LeaseHandedBack) and action.lease_id == event.lease_id:
            return
        if not isinstance(event, core.RunEnded):
            versions = [self.lease_version(lease)]
            versions += [self.released[lease.prompt_id].min_version] if lease.prompt_id in self.released else []
            assert not self.fits(min(versions), self.next_step), "withdrawn though it could still make it"
            self.attempts[lease.prompt_id] += self.config.on_stale == "requeue"
            self.withdrawn_stale.append(self.num_events)

    def _lose(self, lease: TrueLease) -> None:
        self.attempts[lease.prompt_id] += 1
        self.lost.add(lease.prompt_id)

    def _see_saved(self, action: core.SavePartial, event: core.Event) -> None:
        assert isinstance(event, core.PartialSaved)
        assert (action.lease_id, action.partial) == (event.lease_id, event.partial)
        assert self.leases[action.lease_id].prompt_id == action.prompt_id, "saved of another prompt"
        self.partials[action.prompt_id] = action.partial

    def _check_saved(self, event: core.PartialSaved, before: dict[int, core.Partial]) -> None:
        """A lease that is over saves nothing, and nothing is saved that is too old."""
        lease = self.leases.get(event.lease_id)
        if lease and self.fits(event.partial.min_version, self.next_step):
            assert self.partials[lease.prompt_id] == event.partial
        else:
            assert self.partials == before

    def _see_dropped(self, action: core.DropPartial, event: core.Event) -> None:
        partial = self.partials.pop(action.prompt_id)
        leased = action.prompt_id in {lease.prompt_id for lease in self.leases.values()}
        if leased:
            assert action.num_lost == 0, "its lease accounts for its tokens"
            self.released[action.prompt_id] = partial
            return
        assert action.num_lost == partial.num_tokens
        step = self.next_step + self.cut_is_due()
        ended = self.prompts[action.prompt_id] in ("failed", "unused")
        cannot = len(self.continuing & self.loaded.keys()) < len(self.loaded)
        assert ended or cannot or not self.fits(partial.min_version, step), "dropped though it could be continued"

    def _see_kept(self, action: core.EndLease) -> None:
        """What is saved of a prompt outlives its lease, unless the lease has ended for good."""
        keeps = action.outcome == "lost" or action.reason in ("drained", "handed back")
        assert action.num_kept == self.num_saved(action.prompt_id)
        assert keeps or not action.num_kept
        assert not (keeps and action.prompt_id in self.released), "what could be continued is gone"

    def _see_group_move(self, action: core.MoveGroup, event: core.Event) -> None:
        group = self.groups[action.group_id]
        assert action.prompt_id == group.prompt_id
        if group.state == "arrived":
            assert isinstance(event, core.GroupArrived)
            assert action.state == self._first_state(group)
            group.was_stale = action.state == "expired"
        else:
            legal = {
                "queued": {"cut", "expired", "surplus"},
                "spare": {"cut", "filtered", "surplus"} | ({"expired"} if self.replaces else set()),
                "cut": {"trained", "surplus"},
            }
            assert action.state in legal[group.state], f"{group.state} -> {action.state}"
            if action.state == "filtered":
                self.dropped.add(action.group_id)
        if action.state == "surplus":
            assert self.over or self.barrier
            group.reason = action.reason
        if action.state == "expired":
            assert not self.fits(group.min_version, self.next_step), "expired though it fits"
            self.attempts[group.prompt_id] += self.config.on_stale == "requeue"
        group.state, group.changed = action.state, self.num_events

    def _first_state(self, group: TrueGroup) -> str:
        if not self.fits(group.min_version, self.next_step):
            return "expired"
        if group.verdict == "kept":
            return "queued"
        fills = self.limited and self.filter.on_limit == "unfiltered" and group.verdict == "constant"
        return "spare" if self.barrier or self.replaces or fills else "filtered"

    def _see_prompt_move(self, action: core.MovePrompt, event: core.Event) -> None:
        prompt_id = action.prompt_id
        before = self.prompts.get(prompt_id, "waiting")
        assert action.state in LEGAL_MOVES.get(before, ()), f"prompt {prompt_id}: {before} -> {action.state}"
        assert action.attempts == self.attempts[prompt_id]
        used_up = action.attempts >= self.max_attempts
        if action.state == "waiting":
            assert not used_up
            behind = prompt_id in self.lost and not self.barrier
            last = max([self.num_fresh, *(self.places[p] for p, s in self.prompts.items() if s == "waiting")])
            self.places[prompt_id] = last + self.size if behind else prompt_id
        if action.state == "failed":
            assert used_up or isinstance(event, core.LeaseFailed)
        if action.state == "expired":
            assert self.config.on_stale != "requeue"
        if action.state == "unused":
            assert isinstance(event, core.RunEnded)
        self.lost.discard(prompt_id)
        self.prompts[prompt_id] = action.state
        self.prompt_changed[prompt_id] = self.num_events
        if action.state == "waiting":
            assert action.place == self.places[prompt_id]

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

        replaced = self.replaces and self.num_ready() >= self.size
        expected = self._expect_replaced() if replaced else self._expect_filtered()
        assert set(action.group_ids) == set(expected), "not the first of the queue"
        self._see_copies(action, replaced)
        if len(members) + sum(action.copies) != self.size:
            assert 0 < len(members) < self.size
            used_up = self.next_prompt() is None and not self.leases and self.filter.on_limit == "partial"
            assert used_up or (self.at_limit and self.filter.on_limit in ("partial", "unfiltered")), "a short batch"
        self.num_cut, self.at_limit = action.step, False
        self.batches[action.step] = list(action.group_ids)
        self.gen_batches_of_step, self.num_since_due = 0, 0

    def _expect_replaced(self) -> list[int]:
        """The kept ones of the first groups; the others, and those without a kept one before them, are filtered."""
        taken = self.ready()[: self.size]
        kept = [i for i in taken if self.groups[i].verdict == "kept"]
        assert kept, "nothing to copy"
        self.filtered_at_cut = {*self.barren(), *taken} - set(kept)
        return kept

    def _expect_filtered(self) -> list[int]:
        expected = self.in_queue_order(self.in_state("queued"))[: self.size]
        if self.at_limit and self.filter.on_limit == "unfiltered":
            constant = [i for i in self.in_state("spare") if self.groups[i].verdict == "constant"]
            expected += self.in_queue_order(constant)[: self.size - len(expected)]
        spare = self.in_state("spare")
        last = max((self.groups[i].prompt_id for i in expected), default=-1)
        goes_back = self.barrier and not self.is_last_cut()
        self.filtered_at_cut = {
            i for i in spare if i not in expected and not (goes_back and self.groups[i].prompt_id > last)
        }
        return expected

    def is_last_cut(self) -> bool:
        """The data is used up, so that no other batch follows."""
        return not self.at_limit and self.num_ready() < self.size

    def _see_copies(self, action: core.CutBatch, replaced: bool) -> None:
        if sum(action.copies) == 0:
            assert action.copies == ()
        else:
            assert replaced, "copies though nothing is replaced"
            assert len(action.copies) == len(action.group_ids)
            assert min(action.copies) >= 0
            self.copies[action.step] = action.copies
        assert not replaced or len(action.group_ids) + sum(action.copies) == self.size, "a place is empty"

    def _check_dropped(self) -> None:
        """A spare group ends `filtered` with a cut, or as one of a batch's worth of which none is kept."""
        assert self.filtered_at_cut <= self.dropped
        barren = self.dropped - self.filtered_at_cut
        if not barren:
            return
        assert self.replaces, "filtered without a cut"
        assert not self.limited, "on_limit may need it"
        assert len(barren) % self.size == 0
        held = self.in_queue_order([*barren, *self.in_state("queued"), *self.in_state("spare")])
        assert set(held[: len(barren)]) == barren, "a kept group stands before it"

    def _see_gen_batch_closed(self, action: core.GenBatchClosed, *, at_cut: bool) -> None:
        size = self.filter.gen_batch_multiplier * self.size
        assert (action.step, action.number) == (self.gen_batch_step, self.gen_batch_number)
        assert self.gen_batch_verdicts == size or (at_cut and 0 < self.gen_batch_verdicts < size)
        full, self.gen_batch_verdicts = self.gen_batch_verdicts == size, 0
        out = 0 < self.filter.max_gen_batches <= self.gen_batches_of_step
        if full and out and self.num_ready() < self.size and not self.over:
            self.at_limit = True

    def _see_pace(self, action: core.PaceMeasured, event: core.Event) -> None:
        assert self.config.run_ahead == "auto"
        assert isinstance(event, core.Published)
        assert event.version == action.step
        following = [*self.batches.get(action.step + 1, ()), *range(sum(self.copies.get(action.step + 1, ())))]
        ready = len(following) + self.num_ready()
        assert action.of_learner == (self.run_ahead() + 2) * self.size - ready
        self.measured.append((action.step, action.of_workers, action.of_learner))
        assert action.run_ahead == self.run_ahead()

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
        prompts: dict[str, list[int]] = {}
        held: dict[str, list[int]] = {"leased": [lease.prompt_id for lease in self.leases.values()]}
        for prompt_id, state in self.prompts.items():
            prompts.setdefault(state, []).append(prompt_id)
        for group in self.groups.values():
            held.setdefault(group.state, []).append(group.prompt_id)
        for state in ("leased", "queued", "spare", "cut", "trained", "filtered"):
            assert sorted(held.get(state, ())) == sorted(prompts.get(state, ())), state
        assert "arrived" not in held, "a group is nowhere"
        members = [group_id for batch in self.batches.values() for group_id in batch]
        assert len(members) == len(set(members))
        assert all(count >= 0 for count in self.credits.values())
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
        assert self.limited or not (self.replaces and self.barren()), "held though there is nothing to copy"
        assert not self.cut_is_due() or self.held_back(), "a due cut was not made"
        could_lease = self.able_workers() and self.next_prompt() is not None and self.admits()
        assert not could_lease, "a lease could be granted"
