"""Rollbacks of a small run: what stands, what is undone, and which payloads go."""

import pytest

from asyncdapo.errors import RunError
from asyncdapo.replay.config import ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.ledger import describe_unreadable
from tests.replay.small_run import SmallRun, finished_run, rows, segments, trained_run


def members(run_dir, step):
    return [row["group_id"] for row in rows(run_dir, f"SELECT group_id FROM groups WHERE step = {step}")]


def state_of(run_dir, prompt_id):
    [row] = rows(run_dir, f"SELECT state, reason, place FROM prompts WHERE prompt_id = {prompt_id}")
    return tuple(row.values())


def test_a_batch_that_was_trained_after_the_checkpoint_stands_as_cut_with_the_same_members(tmp_path):
    run = trained_run(tmp_path, 3)
    before = members(tmp_path, 2)
    run.roll_back(1)
    assert {group.group_id for group in run.state.cut_batches.untrained[2]} == set(before)
    assert run.state.next_batch.step == 3
    assert run.state.cut_batches.in_training == {2: 2}
    run.train(2)
    assert members(tmp_path, 2) == before


def test_nothing_sampled_by_undone_weights_survives_and_its_prompts_are_sampled_again(tmp_path):
    run = trained_run(tmp_path, 3)
    newer = rows(tmp_path, "SELECT group_id, prompt_id FROM groups WHERE max_version > 1")
    assert newer
    run.roll_back(1)
    assert rows(tmp_path, "SELECT group_id FROM groups WHERE max_version > 1") == []
    undone = rows(tmp_path, "SELECT group_id, prompt_id FROM undone_groups WHERE undone_by = 1")
    assert {row["group_id"] for row in newer} == {row["group_id"] for row in undone}
    assert all(state_of(tmp_path, row["prompt_id"])[0] == "waiting" for row in newer)


def test_a_filtered_group_of_old_weights_stays_filtered_though_it_came_after_the_checkpoint(tmp_path):
    run = trained_run(tmp_path, 1)
    solved = run.running(0)[0]
    prompt_id = run.leases[solved].prompt.prompt_id
    run.answer(solved, accs=(1.0, 1.0))
    run.roll_back(1)
    assert state_of(tmp_path, prompt_id) == ("filtered", "constant", None)


def test_of_two_groups_of_a_prompt_the_later_one_stands(tmp_path):
    """Under `requeue` a group expired after the checkpoint, and its prompt has another one that is old enough too."""
    run = trained_run(tmp_path, 1, on_stale="requeue", max_staleness=2)
    run.fill(0)
    run.train(2)
    run.fill(0)
    stale = run.running(0)[0]
    prompt_id = run.leases[stale].prompt.prompt_id
    run.answer(stale)
    run.train(3)
    again = next(i for i in run.ready(0, 4) or run.running(0) if run.leases[i].prompt.prompt_id == prompt_id)
    run.answer(again, versions=((1, 4),))
    run.roll_back(1)
    groups = rows(tmp_path, f"SELECT group_id, state FROM groups WHERE prompt_id = {prompt_id}")
    assert groups == [{"group_id": again, "state": "queued"}]
    assert state_of(tmp_path, prompt_id) == ("queued", "", None)
    assert [row["attempts"] for row in rows(tmp_path, "SELECT DISTINCT attempts FROM prompts")] == [0]
    assert run.journal.outcome(stale) == "undone"


def test_those_in_flight_go_first_and_a_lost_one_waits_in_its_own_place_without_an_attempt(tmp_path):
    run = trained_run(tmp_path, 1)
    run.ready(0, 9)
    lost = run.running(0)[0]
    run.dispatch.apply(core.LeaseLost(lease_id=lost, reason="stalled"))
    run.messages()
    running = run.running(0)
    prompts = {lease_id: run.leases[lease_id].prompt.prompt_id for lease_id in [lost, *running]}
    assert prompts[lost] < min(prompts[lease_id] for lease_id in running)
    run.roll_back(1)
    assert state_of(tmp_path, prompts[lost]) == ("waiting", "rolled back", prompts[lost])
    granted = [run.leases[lease_id] for lease_id in run.ready(0, 9)]
    assert [lease.prompt.prompt_id for lease in granted] == sorted(prompts[lease_id] for lease_id in running)
    run.answer(granted[0].lease_id, accs=(1.0, 1.0), versions=((1, 4),))
    lease = run.leases[granted[-1].lease_id + 1]
    assert lease.prompt.prompt_id == prompts[lost]
    assert {(lease.attempt, lease.branch) for lease in [*granted, lease]} == {(1, 1)}


def test_at_the_barrier_all_go_in_rising_prompt_id(tmp_path):
    run = SmallRun(tmp_path, run_ahead=0, max_staleness=0)
    run.join(0)
    first, second = run.ready(0, 2)
    run.dispatch.apply(core.LeaseLost(lease_id=first, reason="stalled"))
    assert run.running(0) == [second]
    run.roll_back(0)
    assert [run.leases[lease_id].prompt.prompt_id for lease_id in run.ready(0, 2)] == [0, 1]


def test_a_group_of_an_undone_lease_is_late(tmp_path):
    run = trained_run(tmp_path, 1)
    [held, *_] = run.ready(0, 1) or run.running(0)
    run.roll_back(1)
    assert run.journal.outcome(held) == "undone"
    run.answer(held, versions=((1, 4),))
    assert rows(tmp_path, f"SELECT * FROM groups WHERE group_id = {held}") == []
    assert rows(tmp_path, f"SELECT kind FROM events WHERE lease_id = {held}") == [{"kind": "late"}]


def test_lease_ids_of_undone_leases_are_not_used_again(tmp_path):
    run = trained_run(tmp_path, 1)
    highest = max(run.leases)
    run.roll_back(0)
    assert min(run.ready(0, 4)) > highest


def test_a_worker_has_joined_again_only_when_it_says_so(tmp_path):
    run = trained_run(tmp_path, 2)
    run.journal.roll_back(1, "resumed", run.config, replaces=False)
    assert run.journal.recover().workers == {}
    assert run.journal.recover().leases == []


def test_a_kept_group_whose_tokens_are_gone_is_sampled_again_and_named(tmp_path):
    run = trained_run(tmp_path, 1, segment_bytes=1)
    kept = run.running(0)[0]
    prompt_id = run.leases[kept].prompt.prompt_id
    run.answer(kept)
    torn = tmp_path / "payloads" / f"{segments(tmp_path)[-1]:06d}.bin"
    torn.write_bytes(torn.read_bytes()[:-1])
    run.roll_back(1)
    assert state_of(tmp_path, prompt_id)[0] == "waiting"
    assert run.journal.outcome(kept) == "undone"
    said = describe_unreadable(tmp_path, branch=1)
    assert said.startswith(f"1 group can't be read back, its prompt is sampled again: group {kept} (payloads/")
    assert "the file ends before its" in said


def test_a_batch_with_a_torn_member_is_not_restored_and_its_others_return_to_the_queue(tmp_path):
    run = trained_run(tmp_path, 2, segment_bytes=1)
    torn, whole = members(tmp_path, 2)
    [place] = rows(tmp_path, f"SELECT segment FROM groups WHERE group_id = {torn}")
    (tmp_path / "payloads" / f"{place['segment']:06d}.bin").unlink()
    run.roll_back(1)
    assert [group.group_id for group in run.state.held.queued] == [whole]
    assert run.state.next_batch.step == 2
    [event] = rows(tmp_path, "SELECT lease_id, step, detail FROM events WHERE kind = 'unreadable'")
    assert (event["lease_id"], event["step"]) == (torn, 2)
    assert "No such file" in event["detail"]


@pytest.mark.parametrize(("on_stale", "state"), [("drop", "expired"), ("wait", "expired"), ("requeue", "waiting")])
def test_a_run_resumed_with_a_tighter_bound_trains_nothing_beyond_it(tmp_path, on_stale, state):
    """Batch 2 holds groups of version 0, so that they are of staleness 1, which the new bound forbids."""
    run = SmallRun(tmp_path, on_stale=on_stale)
    run.join(0)
    run.fill(0)
    run.train(1)
    run.fill(0)
    run.train(2)
    prompts = [row["prompt_id"] for row in rows(tmp_path, "SELECT prompt_id FROM groups WHERE step = 2")]
    tighter = ReplayConfig(run_ahead=0, max_staleness=0, on_stale=on_stale)
    run.journal.roll_back(1, "resumed", tighter, replaces=False)
    assert run.journal.recover().batches == {}
    assert [state_of(tmp_path, prompt_id)[0] for prompt_id in prompts] == [state, state]
    attempts = rows(tmp_path, "SELECT SUM(attempts) AS attempts FROM prompts")
    assert attempts == [{"attempts": 0}]


def test_a_finished_run_resumes_with_what_its_end_made_unused(tmp_path):
    finished_run(tmp_path)
    unused = rows(tmp_path, "SELECT prompt_id FROM prompts WHERE state = 'unused'")
    assert unused
    run = SmallRun(tmp_path)
    assert run.state.over
    run.roll_back(3)
    assert not run.state.over
    assert rows(tmp_path, "SELECT prompt_id FROM prompts WHERE state = 'unused'") == []
    run.fill(0, versions=((3, 4),))
    run.train(4)
    assert rows(tmp_path, "SELECT branch FROM batches WHERE step = 4") == [{"branch": 1}]


def test_there_is_no_way_back_to_a_batch_that_the_ledger_does_not_hold(tmp_path):
    run = trained_run(tmp_path, 1)
    with pytest.raises(RunError, match=r"ledger\.db: holds no batch 2 to go back to"):
        run.journal.roll_back(2, "resumed", run.config, replaces=False)
    assert run.journal.branch == 0
    assert rows(tmp_path, "SELECT branch FROM branches") == [{"branch": 0}]


def test_a_rollback_that_fails_undoes_nothing(tmp_path, monkeypatch):
    run = trained_run(tmp_path, 2)
    before = {table: rows(tmp_path, f"SELECT * FROM {table}") for table in ("prompts", "leases", "groups", "batches")}
    monkeypatch.setattr(run.journal._segments, "problem_with", lambda group_id, place: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.journal.roll_back(1, "resumed", run.config, replaces=False)
    assert {table: rows(tmp_path, f"SELECT * FROM {table}") for table in before} == before
    assert run.journal.branch == 0


def test_totals_are_those_of_the_surviving_history_and_what_was_undone(tmp_path):
    run = trained_run(tmp_path, 2)
    run.fill(0, versions=((2, 4),))
    run.roll_back(1)
    totals = run.journal.recover().totals
    [groups] = rows(tmp_path, "SELECT SUM(tokens) AS undone FROM undone_groups")
    assert totals.tokens["trained"] == 16
    assert totals.tokens["undone"] == groups["undone"] > 0
    assert totals.groups["trained"] == 2
