"""The journal: what it writes, what survives a kill, when payloads go."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from asyncdapo.errors import RunError, UserError
from asyncdapo.messages import Lease
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.ledger import last_trained, read_group
from asyncdapo.replay.server.arrivals import arrival
from tests.replay.small_run import SmallRun, finished_run, make_group, prompt_at, resumed_run, rows, segments


def lease(lease_id, prompt_id=0):
    return Lease(lease_id=lease_id, branch=0, attempt=1, group_size=2, seed=1, prompt=prompt_at(prompt_id))


def same(payload, other):
    pairs = zip(payload.frames(), other.frames(), strict=True)
    return all(mine == theirs for mine, theirs in pairs)


def test_each_event_is_one_position_and_rows_remember_theirs(tmp_path):
    finished_run(tmp_path)
    leases = rows(tmp_path, "SELECT granted_pos, ended_pos FROM leases")
    assert all(0 < row["granted_pos"] < row["ended_pos"] for row in leases)
    groups = rows(tmp_path, "SELECT arrived_pos, changed_pos, state FROM groups")
    assert all(row["arrived_pos"] < row["changed_pos"] for row in groups if row["state"] == "trained")
    trained = rows(tmp_path, "SELECT trained_pos FROM batches ORDER BY step")
    assert all(a["trained_pos"] < b["trained_pos"] for a, b in pairwise(trained))


def test_a_batch_row_comes_in_the_transaction_that_trains_its_groups(tmp_path):
    finished_run(tmp_path)
    mixed = rows(
        tmp_path,
        "SELECT b.step FROM batches b JOIN groups g ON g.step = b.step WHERE g.changed_pos <> b.trained_pos",
    )
    assert mixed == []
    [batch] = rows(tmp_path, "SELECT * FROM batches WHERE step = 2")
    assert (batch["learner_version"], batch["groups"], batch["tokens"]) == (1, 2, 16)
    assert (batch["staleness_max"], batch["staleness_mean"]) == (1, 1.0)
    assert json.loads(batch["summary"]) == {"learner/loss": 0.25}


def test_a_prompt_row_knows_its_place_in_the_data(tmp_path):
    finished_run(tmp_path)
    prompts = rows(tmp_path, "SELECT prompt_id, epoch, source, row FROM prompts")
    assert prompts[5] == {"prompt_id": 5, "epoch": 0, "source": "train", "row": 5}


def test_a_group_row_has_the_numbers_of_its_completions(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    [first] = run.ready(0, 1)
    run.answer(first, accs=(1.0, 0.0), versions=((0, 3), (0, 2)))
    [group] = rows(tmp_path, "SELECT * FROM groups")
    assert (group["completions"], group["tokens"], group["truncated"]) == (2, 10, 0)
    assert (group["reward_mean"], group["acc_mean"], group["entered"]) == (0.0, 0.5, "queued")


def test_a_started_lease_remembers_its_version_and_session(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0, session="a1")
    [first] = run.ready(0, 1)
    run.dispatch.apply(core.SamplingBegan(lease_id=first, version=0))
    [row] = rows(tmp_path, "SELECT started_version, session, outcome FROM leases")
    assert row == {"started_version": 0, "session": "a1", "outcome": None}


def test_an_event_without_consequences_makes_no_transaction(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.dispatch.apply(core.Ready(worker=0, credits=0))
    run.dispatch.apply(core.BatchWanted(step=1))
    run.dispatch.apply(core.WeightsLoaded(worker=0, version=0))
    assert [row["pos"] for row in rows(tmp_path, "SELECT pos FROM loads")] == [1, 2]


def test_the_outcome_of_a_lease_is_known(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    first, second = run.ready(0, 2)
    run.answer(first)
    assert run.journal.outcome(first) == "done"
    assert run.journal.outcome(second) is None
    for never in (99, -1, 1 << 70):
        with pytest.raises(LookupError):
            run.journal.outcome(never)


def test_a_transaction_that_fails_leaves_nothing(tmp_path):
    journal = Journal(tmp_path)
    joined = core.WorkerJoined(worker=0, loaded_version=0)
    lost_group = core.MoveGroup(group_id=9, prompt_id=9, state="trained", verdict="kept", step=1)
    with pytest.raises(AssertionError, match="never arrived"):
        journal.write(joined, [lost_group])
    assert rows(tmp_path, "SELECT * FROM events") == []
    journal.write(joined, [])
    assert len(rows(tmp_path, "SELECT * FROM events")) == 1


def test_a_second_writer_is_refused_while_the_first_one_lives(tmp_path):
    first = Journal(tmp_path)
    with pytest.raises(RunError, match=rf"ledger\.lock: process {os.getpid()} writes this run's ledger"):
        Journal(tmp_path, lock_wait_s=0.1)
    first.close()
    Journal(tmp_path, lock_wait_s=0.1).close()


DYING_WRITER = """
import sys, time
from pathlib import Path
from asyncdapo.replay.ledger.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(600)
"""


def test_a_successor_waits_until_its_predecessor_has_died(tmp_path):
    dying = subprocess.Popen([sys.executable, "-c", DYING_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert dying.stdout.readline() == "open\n"
    with pytest.raises(RunError, match=f"process {dying.pid} writes"):
        Journal(tmp_path, lock_wait_s=0.1)
    threading.Timer(0.3, dying.kill).start()
    Journal(tmp_path, lock_wait_s=30).close()
    assert dying.wait() == -signal.SIGKILL
    dying.stdout.close()


def test_a_ledger_of_another_layout_is_refused(tmp_path):
    Journal(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.db") as ledger:
        ledger.execute("UPDATE meta SET value = 1 WHERE key = 'schema'")
    with pytest.raises(UserError, match=r"ledger\.db: has schema 1, this program has 3"):
        Journal(tmp_path)
    with pytest.raises(UserError, match="has schema 1"):
        last_trained(tmp_path)


def test_a_journal_that_continues_uses_no_position_again(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.ready(0, 2)
    run.journal.close()
    [before] = rows(tmp_path, "SELECT MAX(granted_pos) AS position FROM leases")
    again = SmallRun(tmp_path)
    again.join(1)
    [after] = rows(tmp_path, "SELECT MAX(pos) AS position FROM events")
    assert after["position"] == before["position"] + 1


def test_the_batches_of_a_ledger_are_known_by_step_and_branch(tmp_path):
    assert last_trained(tmp_path) == {}
    resumed_run(tmp_path)
    assert last_trained(tmp_path) == {1: 0, 2: 1, 3: 3, 4: 3}


def test_anybody_can_read_during_a_run(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    with sqlite3.connect(tmp_path / "ledger.db") as other:
        assert other.execute("SELECT COUNT(*) FROM leases").fetchone() == (0,)
        run.ready(0, 2)
        assert other.execute("SELECT COUNT(*) FROM leases").fetchone() == (2,)


# ------------------------------------------------------------------------------------------------------------ payloads


def test_held_groups_have_payloads_and_filtered_ones_have_none(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    kept, solved = run.ready(0, 2)
    run.answer(kept)
    run.answer(solved, accs=(1.0, 1.0))
    group, payload = read_group(tmp_path, kept)
    expected = make_group(run.leases[kept])
    assert group == expected[0]
    assert same(payload, expected[1])
    with pytest.raises(LookupError, match="isn't kept"):
        read_group(tmp_path, solved)
    with pytest.raises(LookupError, match="no group 99"):
        read_group(tmp_path, 99)


def test_with_keep_payloads_every_group_can_be_read_for_ever(tmp_path):
    run = SmallRun(tmp_path, keep_payloads=True, segment_bytes=1)
    run.join(0)
    kept, solved = run.ready(0, 2)
    run.answer(solved, accs=(1.0, 1.0))
    run.answer(kept)
    run.fill(0)
    run.train(1)
    run.journal.free(run.journal.covered(1))
    assert read_group(tmp_path, kept)[0].lease_id == kept
    assert read_group(tmp_path, solved)[0].lease_id == solved


def test_a_segment_goes_when_a_checkpoint_covers_all_its_groups(tmp_path):
    run = SmallRun(tmp_path, segment_bytes=1)
    run.join(0)
    run.advance(0, 1, 2, 3)
    run.answer(run.running(0)[0], versions=((3, 4),))
    assert segments(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    run.journal.free(run.journal.covered(0))
    assert segments(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    run.journal.free(run.journal.covered(1))
    assert segments(tmp_path) == [3, 4, 5, 6, 7]
    run.journal.free(run.journal.covered(3))
    assert segments(tmp_path) == [7]
    assert rows(tmp_path, "SELECT COUNT(segment) AS kept FROM groups") == [{"kept": 1}]


def test_the_segment_that_is_written_to_stays(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.fill(0)
    run.train(1)
    run.journal.free(run.journal.covered(1))
    assert segments(tmp_path) == [1]


def test_a_segment_with_one_open_group_stays_whole(tmp_path):
    run = SmallRun(tmp_path, segment_bytes=1200, max_staleness=9, run_ahead=2)
    run.join(0)
    for lease_id in run.ready(0, 6)[:4]:
        run.answer(lease_id)
    run.train(1)
    assert [row["segment"] for row in rows(tmp_path, "SELECT segment FROM groups")] == [1, 1, 1, 2]
    run.journal.free(run.journal.covered(1))
    assert segments(tmp_path) == [1, 2]
    assert read_group(tmp_path, 1)[0].lease_id == 1


def test_a_segment_is_let_go_once_the_last_group_in_it_is_trained_and_can_still_be_read(tmp_path):
    run = SmallRun(tmp_path, segment_bytes=1200, max_staleness=9, run_ahead=3)
    run.join(0)
    for lease_id in run.ready(0, 6):
        run.answer(lease_id)
    assert [row["segment"] for row in rows(tmp_path, "SELECT segment FROM groups")] == [1, 1, 1, 2, 2, 2]
    run.train(1)
    assert run.journal.settled(1) == []
    run.train(2)
    assert run.journal.settled(2) == [1]
    run.train(3)
    assert run.journal.settled(3) == []
    run.journal.sync()
    run.journal.let_go([1, 2])
    assert [read_group(tmp_path, lease_id)[0].lease_id for lease_id in range(1, 7)] == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------------------------- kill


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from typing import get_args
from tests.replay.small_run import SmallRun, write_files
run = SmallRun(Path(sys.argv[1]))
run.join(0)
run.fill(0)
run.train(1)
run.answer(run.running(0)[0])
write_files(Path(sys.argv[1]), run.lines)
print(max(run.leases), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_everything_committed_outlives_a_kill(tmp_path):
    """No close, no flush: the files are as SIGKILL leaves them, and audit finds them sound."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr
    assert audit(tmp_path) == []
    [last] = rows(tmp_path, "SELECT MAX(lease_id) AS id FROM leases")
    assert last["id"] == int(killed.stdout)
    [queued] = rows(tmp_path, "SELECT group_id FROM groups WHERE state = 'queued'")
    group, payload = read_group(tmp_path, queued["group_id"])
    assert len(payload.token_ids) == group.num_tokens
    assert np.isfinite(payload.logprobs).all()


def test_a_group_of_many_metrics_is_described_by_those_that_all_completions_share():
    group, _ = make_group(lease(1))
    first, second = group.completions
    first = replace(first, metrics={**first.metrics, "its_own": 1.0})
    event = arrival(replace(group, completions=[first, second]))
    assert event.metrics == {"acc": [1.0, 0.0], "score": [1.0, -1.0], "seq_reward": [1.0, -1.0]}
    assert (event.min_version, event.max_version, event.num_loss_tokens) == (0, 0, 8)
