"""Bugs planted in the product, each of which some seeds must bring to light: a judge that passes all judges nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest

from asyncdapo.replay.core import lifecycle
from asyncdapo.replay.core import queue as held
from asyncdapo.replay.core.admission import Admission
from asyncdapo.replay.core.batch import CutBatches, HeldGroup
from asyncdapo.replay.core.events import EndLease, PromptState
from asyncdapo.replay.core.leases import Lease, Leases
from asyncdapo.replay.core.lifecycle import Lifecycle
from asyncdapo.replay.ledger import reload
from asyncdapo.replay.ledger.rollback import Rollback
from asyncdapo.replay.server.dispatch import Dispatch
from asyncdapo.replay.server.sessions import Sessions
from tests.simulation.world import simulate

NUM_SEEDS = 150
"""Seeds within which a bug must show; every mutant shows in far fewer."""
Plant = Callable[[pytest.MonkeyPatch], None]


def admission_ignores_what_is_in_training(patch: pytest.MonkeyPatch) -> None:
    rule = Admission.admits
    patch.setattr(Admission, "admits", lambda self, *, in_training, **rest: rule(self, in_training=0, **rest))


def admission_is_off_by_a_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "capacity", property(lambda self: (self.run_ahead + 2) * self.prompts_per_step))


def admission_holds_back_the_last_lease(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "capacity", property(lambda self: (self.run_ahead + 1) * self.prompts_per_step - 1))


def _accept_again(patch: pytest.MonkeyPatch, outcome: str) -> None:
    """A group passes although its lease has ended with `outcome`, at every place that would notice."""
    end, end_session, over = Leases.end, Dispatch._end_lease, {}

    def end_and_remember(self: Leases, lease: Lease, how: str, reason: str = "", *, keep: bool = False) -> None:
        end(self, lease, how, reason, keep=keep)
        if how == outcome:
            over[self, lease.lease_id] = lease

    def end_if_running(self: Leases, lease_id: int, how: str, reason: str = "") -> Lease | None:
        if lease := over.get((self, lease_id)):
            self.running[lease_id] = lease
        return real(self, lease_id, how, reason)

    def keep(self: Dispatch, action: EndLease, detail: str) -> None:
        held = self._sessions.leases.get(action.lease_id)
        end_session(self, action, detail)
        if action.outcome == outcome and held:
            self._sessions.leases[action.lease_id] = held

    real = Leases.end_if_running
    patch.setattr(Leases, "end", end_and_remember)
    patch.setattr(Leases, "end_if_running", end_if_running)
    patch.setattr(Dispatch, "_end_lease", keep)
    anything = frozenset(get_args(PromptState))
    patch.setattr(lifecycle, "MOVES", dict.fromkeys(lifecycle.MOVES, anything))


def a_repeated_group_is_taken_again(patch: pytest.MonkeyPatch) -> None:
    _accept_again(patch, "done")


def a_late_group_is_taken(patch: pytest.MonkeyPatch) -> None:
    _accept_again(patch, "lost")


def groups_of_undone_weights_survive(patch: pytest.MonkeyPatch) -> None:
    fate = Rollback._fate

    def spared(self: Rollback, group: object, next_step: int, *, followed: bool) -> object:
        return fate(self, group._replace(max_version=min(group.max_version, self.step)), next_step, followed=followed)

    patch.setattr(Rollback, "_fate", spared)


def a_rollback_charges_attempts(patch: pytest.MonkeyPatch) -> None:
    """Leases that it ends count as lost."""

    def undo_leases(self: Rollback) -> None:
        self.db.execute("UPDATE leases SET outcome = 'lost', ended_pos = ? WHERE outcome IS NULL", (self.pos,))
        real(self)

    real = Rollback._undo_leases
    patch.setattr(Rollback, "_undo_leases", undo_leases)


def a_cut_batch_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Batch k + 1 gets other members."""
    patch.setattr(Rollback, "_can_restore", lambda self, members: False)


def a_rollback_believes_every_payload(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rollback, "_has_payload", lambda self, group: group.segment is not None)


def a_worker_gets_more_than_it_asked_for(patch: pytest.MonkeyPatch) -> None:
    begin = Sessions.begin

    def generous(self: Sessions, peer: bytes, hello: object) -> object:
        session = begin(self, peer, hello)
        session.granted = -1
        return session

    patch.setattr(Sessions, "begin", generous)


def what_a_drained_worker_hands_back_is_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lifecycle, "hand_back", Lifecycle.lose)


def what_is_handed_back_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    end = Leases.end

    def end_for_good(self: Leases, lease: Lease, how: str, reason: str = "", *, keep: bool = False) -> None:
        end(self, lease, how, reason)

    patch.setattr(Leases, "end", end_for_good)


def copies_are_forgotten_at_a_rollback(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rollback, "_num_copies", lambda self: 0)


def copies_are_drawn_anew_by_every_server(patch: pytest.MonkeyPatch) -> None:
    draw = reload.draw_copies
    patch.setattr(reload, "draw_copies", lambda step, prompt_ids, num: draw(step + 1, prompt_ids, num))


def copies_do_not_count_as_in_training(patch: pytest.MonkeyPatch) -> None:
    add = CutBatches.add

    def add_without(self: CutBatches, step: int, members: list[HeldGroup], copies: tuple[int, ...]) -> None:
        add(self, step, members, copies)
        self.in_training[step] = len(members)

    patch.setattr(CutBatches, "add", add_without)


def a_batch_without_a_kept_group_counts_as_full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(held, "num_barren", lambda kept, spare, size: 0)


MUTANTS = [
    admission_ignores_what_is_in_training,
    admission_is_off_by_a_batch,
    admission_holds_back_the_last_lease,
    a_repeated_group_is_taken_again,
    a_late_group_is_taken,
    groups_of_undone_weights_survive,
    a_rollback_charges_attempts,
    a_cut_batch_is_forgotten,
    a_rollback_believes_every_payload,
    a_worker_gets_more_than_it_asked_for,
    what_a_drained_worker_hands_back_is_lost,
    what_is_handed_back_is_forgotten,
    copies_are_forgotten_at_a_rollback,
    copies_are_drawn_anew_by_every_server,
    copies_do_not_count_as_in_training,
    a_batch_without_a_kept_group_counts_as_full,
]


def first_seed_that_fails() -> int | None:
    for seed in range(NUM_SEEDS):
        try:
            simulate(seed)
        except Exception:  # noqa: BLE001 - a bug may show as anything
            return seed
    return None


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert first_seed_that_fails() is not None
