"""Runs from before completions had contexts: they are audited, read and resumed as before."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from asyncdapo.records.record import Place, read_record, segment_path
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.ledger.ledger import read_group
from tests.replay.former import former_record
from tests.replay.small_run import SmallRun, end, finished_run, rows, write_files


def make_former(run_dir: Path) -> Path:
    """Every payload of the run as it was written then; its ledger is the same but for their places."""
    folder = run_dir / "payloads"
    with closing(sqlite3.connect(run_dir / "ledger.db")) as ledger, ledger:
        places = ledger.execute(
            "SELECT group_id, segment, offset, bytes FROM groups WHERE segment IS NOT NULL ORDER BY segment, offset"
        ).fetchall()
        written = {
            group_id: (place[0], former_record(*read_record(folder, group_id, Place(*place))))
            for group_id, *place in places
        }
        for segment in {segment for segment, _ in written.values()}:
            segment_path(folder, segment).write_bytes(b"")
        for group_id, (segment, record) in written.items():
            with segment_path(folder, segment).open("ab") as file:
                ledger.execute(
                    "UPDATE groups SET offset = ?, bytes = ? WHERE group_id = ?", (file.tell(), len(record), group_id)
                )
                file.write(record)
    return run_dir


def test_a_former_run_is_sound(tmp_path: Path) -> None:
    assert audit(make_former(finished_run(tmp_path))) == []


def test_a_former_run_is_resumed_with_the_groups_that_it_had_queued(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.join(0)
    run.advance(0, 1)
    run.ready(0, 4)
    run.answer(run.running(0)[0], versions=((1, 4),))
    run.journal.close()
    make_former(tmp_path)
    write_files(tmp_path, run.lines)
    assert audit(tmp_path) == []

    lines, run = run.lines, SmallRun(tmp_path)
    run.lines = lines
    run.roll_back(1)
    [queued] = rows(tmp_path, "SELECT group_id FROM groups WHERE state = 'queued'")
    group, payload = read_group(tmp_path, queued["group_id"])
    assert [completion.num_turns for completion in group.completions] == [1, 1]
    assert group.num_tokens == group.num_sampled_tokens == len(payload.token_ids) == len(payload.logprobs) == 8
    run.advance(0, 2, 3)
    assert rows(tmp_path, f"SELECT step FROM groups WHERE group_id = {queued['group_id']}") == [{"step": 2}]
    assert audit(end(run, tmp_path)) == []
