"""A simulation with a ledger under it, in which the replay server dies and the learner goes back to a checkpoint.

A reload must give the state that was there before; a rollback the one that `TruthWithPast` says. Right after each, and
at the end, the ledger is held to the invariants of audit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group, Prompt
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.invariants import INVARIANTS
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.ledger import open_ledger
from asyncdapo.transport.codec import Buffer, encode
from asyncdapo.transport.payload import Payload
from tests.replay.past import ENDS, TruthWithPast
from tests.replay.scenario import group_done
from tests.replay.simulation import Simulation, World
from tests.replay.small_run import make_partial


def snapshot(state: ReplayState) -> dict[str, object]:
    """All that a state remembers, but for what its peers tell it again: credits and the wish for a batch."""
    gen_batches = state.next_batch.gen_batches
    return {
        "queued": sorted(state.held.queued),
        "spare": sorted(state.held.spare),
        "untrained": state.cut_batches.untrained,
        "copies": state.cut_batches.copies,
        "in_training": state.cut_batches.in_training,
        "next_step": state.next_batch.step,
        "over": state.over,
        "limit_reached": state.next_batch.limit_reached,
        "prompts": state.prompts.unended,
        "num_fresh": state.stream.num_fresh,
        "places": {} if state.over else state.stream.places,
        "running": state.leases.running,
        "num_granted": state.leases.num_granted,
        "loaded": {index: worker.loaded_version for index, worker in state.leases.workers.items()},
        "continuing": {index for index, worker in state.leases.workers.items() if worker.continues},
        "partials": {} if state.over else state.leases.partials.saved,
        "verdicts": list(state.keep_rate._latest),
        "keep_rate": state.keep_rate.value,
        "run_ahead": state.admission.run_ahead,
        "gen_batches": (gen_batches.num_opened, gen_batches._num_verdicts),
        "gen_batch": (gen_batches._step, gen_batches._number) if gen_batches.is_open else None,
    }


class Restarts(Simulation):
    """`run(choices)` reloads and rolls back among all else that may happen."""

    def __init__(self, world: World, run_dir: Path) -> None:
        super().__init__(world)
        self.truth = TruthWithPast(
            world.replay, world.filter, max_attempts=world.max_attempts, num_prompts=world.num_prompts
        )
        self.run_dir, self.journal = run_dir, Journal(run_dir)
        self.num_reloads, self.num_rollbacks = 0, 0
        self.branch_of: dict[int, tuple[int, core.GrantLease]] = {}

    def write(self, event: core.Event, actions: list[core.Action]) -> None:
        grants = [action for action in actions if isinstance(action, core.GrantLease)]
        self.branch_of |= {grant.lease_id: (self.journal.branch, grant) for grant in grants}
        self.journal.write(
            event,
            actions,
            prompts=[prompt(grant.prompt_id) for grant in grants],
            arrived=self._arrived(event) if isinstance(event, core.GroupArrived) else None,
            saved=self._saved(event) if isinstance(event, core.PartialSaved) else (),
            detail="session" if isinstance(event, core.WorkerJoined) else "",
        )

    def _saved(self, event: core.PartialSaved) -> list[Buffer]:
        partial = event.partial
        versions = [(partial.min_version, partial.num_tokens - 1), (partial.max_version, 1)]
        return encode(*make_partial(event.lease_id, [(versions, None)]))

    def _arrived(self, event: core.GroupArrived) -> tuple[Group, Payload]:
        branch, grant = self.branch_of[event.lease_id]
        completion = Completion(
            contexts=[Context.of_turn([(event.min_version, 1), (event.max_version, 1)], [(1, 2)], NO_CHECKSUM)],
            finish_reason="stop",
            reward=1.0,
            metrics={},
        )
        group = Group(
            prompt_id=grant.prompt_id,
            lease_id=grant.lease_id,
            branch=branch,
            attempt=grant.attempt,
            worker=grant.worker,
            num_prompt_tokens=1,
            completions=[completion],
            generate_s=0.0,
        )
        return group, Payload(np.zeros(1, np.int32), np.zeros(2, np.int32), np.zeros(2, np.float32))

    def _possible(self) -> list[Callable[[], None]]:
        return [*super()._possible(), self._reload, self._roll_back]

    def _reload(self) -> None:
        if self._pick(3) == 0:
            self.reload()

    def _roll_back(self) -> None:
        if self._pick(3) == 0:
            self.roll_back(max(0, self.num_trained - self._pick(3)))

    # ------------------------------------------------------------------------------------------ what must hold then

    def reload(self) -> None:
        """The server dies; another one takes over. Its peers tell it what it can't know."""
        before = snapshot(self.state)
        self._open_again()
        assert snapshot(self.state) == before
        self.truth.num_since_due = 0
        self.num_reloads += 1
        for index in self.truth.credits:
            self.truth.credits[index] = 0
        self._ask_again()

    def roll_back(self, step: int) -> None:
        """The learner, or the whole run, goes back to the checkpoint of `step`; no worker is joined any more."""
        trained = self._trained()
        self.journal.roll_back(step, "test", self.world.replay, replaces=self.world.filter.replaces)
        self.truth.roll_back(step)
        self.num_rollbacks += 1
        for worker in self.workers.values():
            for lease_id, started in worker.running.items():
                self.echoes.append(group_done(lease_id, "kept", started or 0, worker.loaded))
        self.workers = {}
        self.num_asked, self.num_trained, self.num_published = step, step, step
        self._open_again()
        self.check_against_truth()
        self.check_ledger(step)
        assert self._trained() == {k: members for k, members in trained.items() if k <= step}
        self.check_wait()

    def _trained(self) -> dict[int, set[int]]:
        batches: dict[int, set[int]] = {}
        with closing(open_ledger(self.run_dir)) as ledger:
            for step, prompt_id in ledger.execute("SELECT step, prompt_id FROM groups WHERE state = 'trained'"):
                batches.setdefault(step, set()).add(prompt_id)
        return batches

    def _open_again(self) -> None:
        self.journal.close()
        self.journal = Journal(self.run_dir)
        self.state = ReplayState(
            self.world.replay,
            self.world.filter,
            max_attempts=self.world.max_attempts,
            num_prompts=self.world.num_prompts,
            recovered=self.journal.recover(),
        )

    def _ask_again(self) -> None:
        if self.num_asked > self.truth.num_cut:
            self.tell(core.BatchWanted(step=self.num_asked))

    def check_against_truth(self) -> None:
        state, truth = snapshot(self.state), self.truth
        unended = {p: (s, truth.attempts[p]) for p, s in truth.prompts.items() if s not in ENDS}
        assert state["prompts"] == unended
        assert state["places"] == {p: truth.places[p] for p, (s, _) in unended.items() if s == "waiting"}
        assert state["num_fresh"] == truth.num_fresh
        assert state["next_step"] == truth.next_step
        for held in ("queued", "spare"):
            assert {group.group_id for group in state[held]} == set(truth.in_state(held)), held
        members = {step: set(ids) for step, ids in truth.batches.items() if step not in truth.trained}
        assert {step: {group.group_id for group in ids} for step, ids in state["untrained"].items()} == members
        copies = {step: truth.copies[step] for step in members if step in truth.copies}
        assert state["copies"] == copies
        assert state["in_training"] == {step: len(ids) + sum(copies.get(step, ())) for step, ids in members.items()}
        assert state["partials"] == ({} if truth.over else truth.partials)
        assert not state["running"]
        assert not state["loaded"]
        assert state["num_granted"] == max(truth.ended_leases, default=0)
        assert state["keep_rate"] == truth.keep_rate()
        assert state["run_ahead"] == truth.run_ahead()
        assert state["gen_batches"] == (truth.gen_batches_of_step, truth.gen_batch_verdicts)
        if truth.gen_batch_verdicts:
            assert state["gen_batch"] == (truth.gen_batch_step, truth.gen_batch_number)
        assert state["limit_reached"] == truth.at_limit
        assert state["over"] == truth.over

    def check_ledger(self, rolled_back_to: int | None = None) -> None:
        """The invariants of audit; right after a rollback nothing newer than its weights is there."""
        size = self.world.replay.prompts_per_step
        limits = {
            "bound": self.world.replay.staleness_bound,
            "batch_min": 1,
            "batch_max": size,
            "group_size": 1,
            "max_attempts": self.world.max_attempts,
            "replaces": self.truth.replaces,
            "finished": 0,
        }
        with closing(open_ledger(self.run_dir)) as ledger:
            for invariant, query in INVARIANTS.items():
                rows = [dict(row) for row in ledger.execute(query, limits)]
                assert rows == [] or invariant == "there is a batch", f"{invariant}: {rows}"
            if rolled_back_to is not None:
                newest = ledger.execute("SELECT MAX(max_version) FROM groups").fetchone()[0]
                assert newest is None or newest <= rolled_back_to


def prompt(prompt_id: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, epoch=0, source="test", row=prompt_id, token_ids=[1], answer="")
