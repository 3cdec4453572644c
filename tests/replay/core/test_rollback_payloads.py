"""Payloads and rollbacks: what a checkpoint needs is kept, what was undone goes."""

import math

from asyncdapo.replay.ledger.ledger import read_group
from tests.replay.core.test_rollback import members
from tests.replay.small_run import rows, segments, trained_run


def test_the_oldest_checkpoint_kept_can_still_be_resumed_from(tmp_path):
    run = trained_run(tmp_path, 4, segment_bytes=1)
    run.journal.free(run.journal.covered(2))
    freed = [row["group_id"] for row in rows(tmp_path, "SELECT group_id FROM groups WHERE segment IS NULL")]
    assert freed == sorted(members(tmp_path, 1) + members(tmp_path, 2))
    run.roll_back(2)
    for group in run.state.cut_batches.untrained[3]:
        assert read_group(tmp_path, group.group_id)[0].lease_id == group.group_id


def test_payloads_of_undone_groups_go_with_the_next_checkpoint(tmp_path):
    run = trained_run(tmp_path, 2, segment_bytes=1)
    run.fill(0, versions=((2, 4),))
    run.roll_back(1)
    undone = {row["segment"] for row in rows(tmp_path, "SELECT segment FROM undone_groups")}
    assert undone & set(segments(tmp_path))
    run.train(2)
    run.fill(0, versions=((2, 4),))
    run.journal.free(run.journal.covered(2))
    assert not undone & set(segments(tmp_path))
    assert rows(tmp_path, "SELECT segment FROM undone_groups WHERE segment IS NOT NULL") == []


def test_going_back_to_the_beginning_samples_again_what_is_freed(tmp_path):
    run = trained_run(tmp_path, 3, segment_bytes=1)
    run.journal.free(run.journal.covered(3))
    run.roll_back(0)
    assert run.state.cut_batches.untrained == {}
    assert run.state.next_batch.step == 1
    assert not math.isnan(run.state.keep_rate.value)
    run.fill(0)
    run.train(1)
    assert [batch["branch"] for batch in rows(tmp_path, "SELECT branch FROM batches")] == [1]
