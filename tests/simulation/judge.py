"""What must hold, from what the processes did and from what is on the disk. It believes none of them alone.

In: what happens, as it happens. Out: AssertionError at the first breach.

    every committed event     `Truth` of the property tests: admission, staleness, exactly once, batch membership
    every new server          the state is the one before the death
    every grant               the worker has asked for it
    every step's metrics      tokens are counted once; counters are those of the ledger
    every batch               nothing is trained twice; no token is newer than the bound allows, or of weights that a
                              rollback undid; after a rollback batch k + 1 is what it was
    every request             the engine has room for it, as long as no message can be lost
    the end                   audit's invariants; the learner's own record is what the ledger says

Does not own: what happens, and when the run must be over (`world`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Lease
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.invariants import INVARIANTS
from asyncdapo.replay.server.sessions import Session
from asyncdapo.shares import Batch
from asyncdapo.transport.payload import Payload, expand
from tests.replay.past import TruthWithPast
from tests.replay.restarts import snapshot
from tests.simulation.plan import GROUP_SIZE

if TYPE_CHECKING:
    from tests.simulation.controller import Controller
    from tests.simulation.learner import Learner
    from tests.simulation.world import World


MOST_TOKENS = 40
"""Of a group, or of what ended leases have had since the last heartbeats."""


class Truth(TruthWithPast):
    """Messages may overtake each other here: what weights a lease began with may be told when it is too late. Then its
    group will be stale when it comes."""

    def observe(self, event: core.Event, actions: Sequence[core.Action]) -> None:
        """Most events say again what credits there are, and change nothing."""
        if actions or not isinstance(event, core.Ready) or self.credits[event.worker] != event.credits:
            super().observe(event, actions)

    def _check_exactly_once(self) -> None:
        """Goes through everything there is, which takes longer than all else, so now and then must do."""
        if self.num_events % 8 == 0 or self.over:
            super()._check_exactly_once()

    def _check_staleness(self) -> None:
        leases = self.leases
        self.leases = {
            lease_id: lease
            for lease_id, lease in leases.items()
            if lease.started_version is None or self.fits(lease.started_version, self.next_step)
        }
        super()._check_staleness()
        self.leases = leases


class Judge:
    """Watches one run."""

    def __init__(self, world: World) -> None:
        plan = world.plan
        self.world = world
        self.truth: Truth | None = Truth(
            plan.replay, plan.filter, max_attempts=plan.max_attempts, num_prompts=plan.num_prompts
        )
        self.branch = 0
        self.known: dict[int, list[tuple[int, int]]] = {}
        """(prompt_id, group_id) of every batch that a learner got, in the history as it stands."""
        self.copies: dict[int, list[int]] = {}
        """Of the same batches."""
        self.state_before: dict[str, Any] | None = None
        self.restores = True
        """Batch k + 1 stands after a rollback to step k."""

    def forget(self) -> None:
        """Tokens may be gone, so that batch k + 1 need not stand after a rollback."""
        self.known.clear()
        self.copies.clear()
        self.truth, self.restores = None, False

    # -------------------------------------------------------------------------------------------------- replay server

    def observe(self, event: Any, actions: Any) -> None:
        """An event was committed."""
        counts = self.world.counts
        counts["events"] += 1
        for action in actions:
            counts["saves"] += isinstance(action, core.SavePartial)
            counts["continued leases"] += isinstance(action, core.GrantLease) and action.num_begun > 0
        if self.world.traced:
            self.world.note("", f"{event}")
            for action in actions:
                self.world.note("", f"    {action}")
        if self.truth:
            self.truth.observe(event, actions)

    def rolled_back(self, step: int, branch: int) -> None:
        self.world.note("rollbacks", f"rolled back to step {step}: branch {branch}")
        self.branch, self.state_before = branch, None
        last = step + self.restores
        self.known = {k: members for k, members in self.known.items() if k <= last}
        self.copies = {k: copies for k, copies in self.copies.items() if k <= last}
        if self.truth:
            self.truth.roll_back(step)

    def died(self, state: dict[str, Any] | None) -> None:
        self.state_before = state

    def reloaded(self, state: Any) -> None:
        self.world.note("reloads" if self.state_before else "", "a replay server resumes from the ledger")
        if self.state_before is not None:
            assert snapshot(state) == self.state_before, "the state after a reload isn't the one before"
        if self.truth:
            self.truth.wanted = 0
            self.truth.credits = dict.fromkeys(self.truth.credits, 0)

    # ------------------------------------------------------------------------------------------------ learner, engine

    def sent(self, session: Session | None, message: Lease | EvalRequest) -> None:
        """A worker gets no more than it has asked for."""
        assert session is None or message.number <= session.asked, "granted without a credit"

    def batch_cut(self, batch: Batch, *, early: bool) -> None:
        """A batch has come, perhaps to a learner that still trains the one before. It is this batch for good."""
        self.world.note("early batches" if early else "", f"batch {batch.step} has come")
        assert batch.branch == self.branch, "a batch of another branch"
        members = [(group.prompt_id, group.lease_id) for group in batch.groups]
        assert self.known.setdefault(batch.step, members) == members, "a batch that was cut is another one now"
        assert self.copies.setdefault(batch.step, batch.copies) == batch.copies, "it has other copies now"

    def batch_arrived(self, learner: Learner, batch: Batch, payloads: Sequence[Payload]) -> None:
        plan, step = self.world.plan, batch.step
        self.world.note("batches", f"batch {step} of prompts {[group.prompt_id for group in batch.groups]}")
        assert batch.branch == self.branch, "a batch of another branch"
        assert step == len(learner.lineage), "not the batch that the learner asked for"
        members = [(group.prompt_id, group.lease_id) for group in batch.groups]
        assert self.known.setdefault(step, members) == members, "a batch that was cut is another one now"
        before = {prompt_id for batch in learner.trained.values() for prompt_id, _ in batch}
        prompt_ids = [prompt_id for prompt_id, _ in members]
        assert not before & set(prompt_ids), "a prompt is trained twice"
        assert prompt_ids == sorted(set(prompt_ids)), "members in rising prompt_id, none twice"
        self._see_copies(step, batch)
        size, num = plan.replay.prompts_per_step, len(members) + sum(batch.copies)
        assert num == size or (num < size and plan.filter.on_limit != "raise"), "a short batch"
        for group, part in zip(batch.groups, payloads, strict=True):
            assert part.prompt_ids.tolist() == [group.prompt_id], "tokens of another group"
            contexts = [context for completion in group.completions for context in completion.contexts]
            versions = [version for context in contexts for version in expand(context.versions).tolist()]
            assert part.token_ids.tolist() == [learner.lineage[version] for version in versions], "undone weights"
            assert step - 1 - min(versions) <= plan.replay.staleness_bound, "too stale"

    def _see_copies(self, step: int, batch: Batch) -> None:
        assert self.copies.setdefault(step, batch.copies) == batch.copies, "a batch that was cut has other copies now"
        if batch.copies:
            self.world.counts["batches with copies"] += 1
            filter, size = self.world.plan.filter, self.world.plan.replay.prompts_per_step
            assert filter.enabled, "copies though every group is kept"
            assert filter.mode == "replace", "copies though nothing is replaced"
            assert len(batch.copies) == len(batch.groups)
            assert min(batch.copies) >= 0
            assert len(batch.groups) + sum(batch.copies) == size, "copies that don't fill the batch"

    def step_done(self, step: int, metrics: dict[str, float]) -> None:
        """Asked once or, since a server died, twice: the metrics are those of the batch."""
        if step in self.known:
            assert metrics["replay/trained_groups"] == len(self.known[step]), "metrics of another batch"
            assert metrics["replay/copies"] == sum(self.copies[step]), "metrics of another batch"
        assert metrics["replay/train_steps"] == step
        self._check_counters(metrics)
        self._check_tokens(metrics)
        assert metrics["replay/staleness_max"] <= self.world.plan.replay.staleness_bound

    def _check_counters(self, metrics: dict[str, float]) -> None:
        """They are what the ledger holds, whatever died since the run began."""
        query = self.world.disk.query
        [(verdicts,)] = query("SELECT COUNT(*) FROM groups WHERE entered <> 'expired'")
        [(closed,)] = query("SELECT COUNT(*) FROM events WHERE kind = 'gen_batch_closed'")
        assert (metrics["filter/prompts_consumed"], metrics["filter/gen_batches"]) == (verdicts, closed)

    def _check_tokens(self, metrics: dict[str, float]) -> None:
        """The classes of tokens sum to what the engines count, but for what is on its way: whatever died."""
        in_flight = metrics["replay/tokens_in_flight"]
        assert in_flight <= (metrics["replay/running"] + 1) * MOST_TOKENS, "tokens that nobody counts"
        if self.world.plan.gentle:
            assert in_flight >= 0, "tokens that are counted twice"

    def engine_takes(self, num_outstanding: int, num: int, num_slots: int) -> None:
        """A worker never works on more than its free slots can start."""
        if self.world.plan.gentle:
            assert num_outstanding < num_slots or num < GROUP_SIZE, "a worker has more to do than it asked for"

    # ------------------------------------------------------------------------------------------------------------ end

    def check_ended_well(self, controller: Controller) -> None:
        """The launch has come to its end by itself."""
        assert self.world.disk.query("SELECT 1 FROM events WHERE kind = 'run_ended'"), "the stream was not closed"
        assert controller.step == controller.steps or controller.no_batch, "steps are missing"

    def check_end(self, controller: Controller) -> None:
        self.check_ledger()
        query = self.world.disk.query
        in_ledger: dict[int, list[tuple[int, int]]] = {}
        for step, *member in query(
            "SELECT step, prompt_id, group_id FROM groups WHERE state = 'trained' ORDER BY prompt_id"
        ):
            in_ledger.setdefault(step, []).append(tuple(member))
        trained = dict(controller.learner.process.trained)
        if max(trained, default=0) > max(in_ledger, default=0):
            trained.popitem()  # the run ended before it could say so
        assert in_ledger == trained, "the learner has trained on other groups than the ledger says"

    def check_ledger(self) -> None:
        """The invariants of audit, and that no prompt of the stream was passed over."""
        plan, query = self.world.plan, self.world.disk.query
        [(finished,)] = query("SELECT EXISTS (SELECT 1 FROM events WHERE kind = 'run_ended')")
        may_be_short = plan.filter.on_limit != "raise" and (plan.filter.max_gen_batches > 0 or plan.num_prompts)
        limits = {
            "bound": plan.replay.staleness_bound,
            "batch_min": 1 if may_be_short else plan.replay.prompts_per_step,
            "batch_max": plan.replay.prompts_per_step,
            "group_size": GROUP_SIZE,
            "max_attempts": plan.max_attempts,
            "replaces": plan.filter.mode == "replace",
            "finished": finished,
        }
        for invariant, statement in INVARIANTS.items():
            rows = query(statement, limits)
            assert rows == [] or (invariant == "there is a batch" and not finished), f"{invariant}: {rows}"
        [(num, highest)] = query("SELECT COUNT(*), MAX(prompt_id) FROM prompts")
        assert num == (-1 if highest is None else highest) + 1, "a prompt of the stream was passed over"
