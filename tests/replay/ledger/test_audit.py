"""Audit: a sound run passes, and every planted breach is named."""

import json
import shutil
import sqlite3

import pytest

from asyncdapo.replay.ledger.audit import audit, run_audit
from asyncdapo.replay.ledger.invariants import INVARIANTS
from tests.replay.small_run import SmallRun, finished_run, replaced_run, resumed_run, write_files

TRAINED = "(SELECT MIN(group_id) FROM groups WHERE state = 'trained')"
TRAINED_LAST = "(SELECT MAX(group_id) FROM groups WHERE state = 'trained')"
TRAINED_PROMPT = "(SELECT MIN(prompt_id) FROM prompts WHERE state = 'trained')"
LOST = "(SELECT MIN(lease_id) FROM leases WHERE outcome = 'lost')"


def back_to(step):
    """A rollback that undid nothing."""
    return f"INSERT INTO branches SELECT 1, step, trained_pos, 1 << 30, 'planted', 0 FROM batches WHERE step = {step}"


SAVED = "INSERT INTO partials VALUES"
PLANTS = {
    "a prompt is in one legal state": f"UPDATE prompts SET state = 'asleep' WHERE prompt_id = {TRAINED_PROMPT}",
    "a finished run has no prompt without an end": "UPDATE prompts SET state = 'waiting' WHERE state = 'unused'",
    "a prompt has at most one live group, and shares its state and step": (
        "UPDATE prompts SET state = 'trained', step = 1 WHERE state = 'filtered'"
    ),
    "a prompt is trained at most once": (
        f"UPDATE groups SET prompt_id = {TRAINED_PROMPT} WHERE group_id = {TRAINED_LAST}"
    ),
    "a leased prompt has one open lease, every other none": (
        "UPDATE leases SET outcome = NULL WHERE lease_id = (SELECT MAX(lease_id) FROM leases)"
    ),
    "an expired prompt has an expired group or a withdrawn lease": (
        "UPDATE prompts SET state = 'expired' WHERE state = 'failed'"
    ),
    "a failed prompt has used up its attempts or has a failed lease": (
        "UPDATE prompts SET state = 'failed' WHERE state = 'expired'"
    ),
    "a prompt uses at most max_attempts": f"UPDATE prompts SET attempts = 4 WHERE prompt_id = {TRAINED_PROMPT}",
    "a prompt's attempts are its lost and rejected leases, and stale ones if those are sampled again": (
        f"UPDATE prompts SET attempts = 1 WHERE prompt_id = {TRAINED_PROMPT}"
    ),
    "a lease has one legal outcome": f"UPDATE leases SET outcome = 'eaten' WHERE lease_id = {LOST}",
    "a finished run has no open lease": f"UPDATE leases SET outcome = NULL WHERE lease_id = {LOST}",
    "a lease ends once, with the outcome that its event says": (
        f"INSERT INTO events (kind, branch, lease_id, detail, pos, at_s) VALUES ('withdrawn', 0, {LOST}, '', 1, 0)"
    ),
    "a lease is of a prompt in the ledger": f"UPDATE leases SET prompt_id = 777 WHERE lease_id = {LOST}",
    "a lease's attempt is between 1 and max_attempts": f"UPDATE leases SET attempt = 0 WHERE lease_id = {LOST}",
    "a lease that is done has its group": "DELETE FROM groups WHERE state = 'filtered'",
    "what is saved is of a prompt that waits or is leased": f"{SAVED} ({TRAINED_PROMPT}, 1, 0, 0, 4, '', '', '', 1, 0)",
    "what is saved has tokens, of weights that are there": f"{SAVED} (777, 1, 0, 99, 4, '', '', '', 1, 0)",
    "a group is in a legal state": "UPDATE groups SET state = 'lost' WHERE state = 'filtered'",
    "a finished run has no group without an end": "UPDATE groups SET state = 'queued' WHERE state = 'filtered'",
    "a group answers the lease of its id: prompt, worker, attempt, branch": (
        f"UPDATE groups SET worker = 9 WHERE group_id = {TRAINED}"
    ),
    "a group has group_size completions": f"UPDATE groups SET completions = 1 WHERE group_id = {TRAINED}",
    "a group's versions are in order": f"UPDATE groups SET max_version = -1 WHERE group_id = {TRAINED}",
    "a trained group stands in a batch, a cut one in one to come, any other in none": (
        f"UPDATE groups SET step = 9 WHERE group_id = {TRAINED}"
    ),
    "staleness is within the bound": f"UPDATE groups SET min_version = 0 WHERE group_id = {TRAINED_LAST}",
    "no token is newer than the weights that its batch trains": (
        f"UPDATE groups SET max_version = 5 WHERE group_id = {TRAINED_LAST}"
    ),
    "there is a batch": "DELETE FROM batches",
    "batches are steps 1, 2, 3, … without a gap": "DELETE FROM batches WHERE step = 2",
    "batch k is trained on the weights of version k - 1": "UPDATE batches SET learner_version = 2 WHERE step = 2",
    "a batch has prompts_per_step groups, copies counted": "UPDATE batches SET groups = 1 WHERE step = 2",
    "copies are of the batch's own groups": """UPDATE batches SET copies = '{"777": 1}' WHERE step = 2""",
    "there are copies under filter.mode: replace only, and they fill the batch": (
        f"UPDATE batches SET copies = json_object({TRAINED} || '', 1) WHERE step = 1"
    ),
    "a batch has as many copies as were cut": "UPDATE events SET number = 1 WHERE kind = 'cut' AND step = 2",
    "a batch's counts are those of its trained groups": "UPDATE batches SET tokens = tokens + 1 WHERE step = 2",
    "a batch's staleness is that of its trained groups": "UPDATE batches SET staleness_max = 0 WHERE step = 2",
    "a waiting prompt has its place in the stream, any other none": (
        f"UPDATE prompts SET place = 7 WHERE prompt_id = {TRAINED_PROMPT}"
    ),
    "a batch was cut once, before it was trained": "DELETE FROM events WHERE kind = 'cut' AND step = 2",
    "branches are 0, 1, 2, … and the newest goes back to a batch that stands": (
        "INSERT INTO branches VALUES (1, 3, 5, 9, 'of a batch 3 that stood at position 5', 0)"
    ),
    "no row is of a branch that never began": "UPDATE loads SET branch = 3 WHERE version = 2",
    "no group of an earlier branch has a token newer than a rollback went back to": back_to(1),
    "no lease of an earlier branch runs, or ended after the checkpoint without a group": back_to(1),
    "a batch is of the branch that trained it, and later than the rollbacks it has seen": back_to(2),
    "what was published and loaded after the checkpoint of a rollback is undone": back_to(2),
    "what a rollback undid is gone": f"INSERT INTO undone_leases SELECT *, 1 FROM leases WHERE lease_id = {LOST}",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def run_dir(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "run")


def plant(run_dir, statement):
    with sqlite3.connect(run_dir / "ledger.db") as ledger:
        assert ledger.execute(statement).rowcount > 0, "the plant changes nothing"


def named(run_dir, words):
    return [breach for breach in audit(run_dir) if words in breach]


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rewrite_metrics(run_dir, lines):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_sound_run_has_no_breach_and_its_summary_is_calm(run_dir, capsys):
    assert audit(run_dir) == []
    assert run_audit(run_dir) == 0
    printed = capsys.readouterr().out
    assert "3 of 6 groups, 48 tokens · staleness max 1" in printed
    assert "trained 6" in printed
    assert "breach:" not in printed


def test_the_sound_run_holds_every_kind_of_end(run_dir):
    with sqlite3.connect(run_dir / "ledger.db") as ledger:
        states = {state for (state,) in ledger.execute("SELECT state FROM prompts")}
        outcomes = {outcome for (outcome,) in ledger.execute("SELECT outcome FROM leases")}
        kinds = {kind for (kind,) in ledger.execute("SELECT kind FROM events")}
    assert states == {"trained", "filtered", "expired", "failed", "unused"}
    assert outcomes == {"done", "withdrawn", "lost", "rejected", "failed"}
    assert {"late", "gen_batch_closed", "worker_lost", "run_ended"} <= kinds


def test_a_run_of_several_branches_is_sound(tmp_path, capsys):
    resumed_run(tmp_path)
    with sqlite3.connect(tmp_path / "ledger.db") as ledger:
        assert ledger.execute("SELECT branch, step FROM branches").fetchall() == [(0, 0), (1, 1), (2, 2), (3, 2)]
        assert ledger.execute("SELECT step, branch FROM batches").fetchall() == [(1, 0), (2, 1), (3, 3), (4, 3)]
    assert audit(tmp_path) == []
    assert run_audit(tmp_path) == 0
    assert "rollbacks 3, the last to step 1, 2, 2 · undone: " in capsys.readouterr().out


def test_a_run_with_copies_is_sound(tmp_path, capsys):
    replaced_run(tmp_path)
    with sqlite3.connect(tmp_path / "ledger.db") as ledger:
        batches = ledger.execute("SELECT groups, copies FROM batches").fetchall()
        [(second,), (third,)] = ledger.execute("SELECT group_id FROM groups WHERE state = 'trained' AND step > 1")
    assert batches == [(2, "{}"), (1, json.dumps({str(second): 1})), (1, json.dumps({str(third): 1}))]
    assert audit(tmp_path) == []
    assert run_audit(tmp_path) == 0
    assert "3 of 4 groups and 2 copies, 32 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statement", "invariant"),
    [
        ("UPDATE batches SET copies = '{}' WHERE step = 2", "a batch has prompts_per_step groups, copies counted"),
        ("UPDATE batches SET copies = '{}' WHERE step = 2", "a batch has as many copies as were cut"),
        (f"UPDATE batches SET copies = json_object({TRAINED} || '', 1) WHERE step = 2", "the batch's own groups"),
        (f"UPDATE batches SET copies = json_object({TRAINED_LAST} || '', 0) WHERE step = 3", "the batch's own groups"),
        (f"UPDATE batches SET copies = json_object({TRAINED_LAST} || '', 2) WHERE step = 3", "they fill the batch"),
    ],
)
def test_copies_that_are_not_what_was_cut_are_named(tmp_path, statement, invariant):
    plant(replaced_run(tmp_path), statement)
    assert named(tmp_path, invariant)


def test_copies_in_a_run_that_filters_are_named(tmp_path):
    replaced_run(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("mode: replace", "mode: filter"))
    assert named(tmp_path, "there are copies under filter.mode: replace only")


def test_a_run_that_was_killed_after_a_rollback_is_sound(tmp_path):
    run = unfinished_run(tmp_path)
    again = SmallRun(tmp_path)
    again.roll_back(1)
    again.fill(0, versions=((1, 4),))
    again.journal.close()
    write_files(tmp_path, run.lines)
    assert audit(tmp_path) == []


def test_a_run_that_continued_after_its_end_is_not_finished(tmp_path):
    finished_run(tmp_path)
    lines = metrics(tmp_path)[1:]
    run = SmallRun(tmp_path)
    run.roll_back(3)
    run.ready(0, 2)
    run.journal.close()
    write_files(tmp_path, lines)
    assert audit(tmp_path) == []


def test_every_invariant_has_a_planted_breach():
    assert set(PLANTS) == set(INVARIANTS)


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_a_planted_breach_is_named(run_dir, invariant, capsys):
    plant(run_dir, PLANTS[invariant])
    assert named(run_dir, f"{invariant}: ")
    assert run_audit(run_dir) == 1
    assert invariant in capsys.readouterr().out


def test_two_rows_of_one_prompt_are_named(run_dir):
    with sqlite3.connect(run_dir / "ledger.db") as ledger:
        ledger.executescript(
            "CREATE TABLE copy AS SELECT * FROM prompts; INSERT INTO copy SELECT * FROM prompts LIMIT 1;"
            "DROP TABLE prompts; ALTER TABLE copy RENAME TO prompts;"
        )
    assert named(run_dir, "a prompt is in one legal state: prompt_id 0, num_rows 2")


def test_two_rows_of_one_lease_are_named(run_dir):
    with sqlite3.connect(run_dir / "ledger.db") as ledger:
        ledger.executescript(
            "CREATE TABLE copy AS SELECT * FROM leases; INSERT INTO copy SELECT * FROM leases LIMIT 1;"
            "DROP TABLE leases; ALTER TABLE copy RENAME TO leases;"
        )
    assert named(run_dir, "a lease has one legal outcome: lease_id 1, num_rows 2")


def test_the_bound_is_the_one_of_the_runs_own_config(run_dir):
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("max_staleness: 1", "max_staleness: 0"))
    assert named(run_dir, "staleness is within the bound")


def test_a_synchronous_run_is_held_to_staleness_0_whatever_max_staleness_says(run_dir):
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("run_ahead: 1.0", "run_ahead: 0"))
    assert named(run_dir, "staleness is within the bound")


def test_a_missing_metrics_line_is_named(run_dir):
    lines = metrics(run_dir)
    rewrite_metrics(run_dir, [line for line in lines if line["step"] != 2])
    assert named(run_dir, "metrics.jsonl has one line for each batch: 2 lines for 3 batches, lacking [2]")
    rewrite_metrics(run_dir, lines[:-2])
    assert named(run_dir, "metrics.jsonl has one line for each batch: 1 lines for 3 batches, lacking [2, 3]")


def test_the_last_metrics_line_may_be_lacking_as_it_is_written_after_the_final_evaluation(run_dir):
    rewrite_metrics(run_dir, metrics(run_dir)[:-1])
    assert audit(run_dir) == []


def test_a_repeated_metrics_line_is_named(run_dir):
    rewrite_metrics(run_dir, [*metrics(run_dir), metrics(run_dir)[-1]])
    assert named(run_dir, "metrics.jsonl has one line for each batch")


@pytest.mark.parametrize("key", ["replay/trained_groups", "replay/copies", "replay/staleness_max"])
def test_a_count_in_metrics_that_differs_from_the_batches_is_named(run_dir, key):
    lines = metrics(run_dir)
    lines[2][key] += 1
    rewrite_metrics(run_dir, lines)
    assert named(run_dir, f"{key} is what ")


@pytest.mark.parametrize("file", ["ledger.db", "metrics.jsonl", "config.yaml"])
def test_a_missing_file_is_named(run_dir, file, capsys):
    (run_dir / file).unlink()
    assert named(run_dir, f"{file}: missing")
    assert run_audit(run_dir) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("file", ["ledger.db", "metrics.jsonl", "config.yaml"])
def test_a_file_of_noise_is_named(run_dir, file):
    (run_dir / file).write_bytes(b"\x00{{ noise\xff" * 500)
    assert named(run_dir, f"{file}: ")


def test_a_torn_ledger_is_named(run_dir):
    path = run_dir / "ledger.db"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert named(run_dir, "ledger.db: ")


def test_a_ledger_of_another_schema_is_named(run_dir):
    plant(run_dir, "UPDATE meta SET value = 99 WHERE key = 'schema'")
    assert named(run_dir, "ledger.db: schema 99")


def test_a_config_without_the_bound_is_named(run_dir):
    (run_dir / "config.yaml").write_text("replay: {prompts_per_step: 2, run_ahead: 1.0}\nrollout: {group_size: 2}\n")
    assert named(run_dir, "config.yaml: ")


def unfinished_run(run_dir, **replay):
    """One step trained, one group queued, the process gone."""
    run = SmallRun(run_dir, **replay)
    run.join(0)
    run.fill(0)
    run.train(1)
    run.answer(run.running(0)[0])
    run.journal.close()
    write_files(run_dir, run.lines)
    return run


def test_a_run_that_was_stopped_is_sound_with_open_states(tmp_path):
    unfinished_run(tmp_path)
    assert audit(tmp_path) == []


def test_a_run_stopped_before_its_last_metrics_line_was_whole_is_sound(tmp_path):
    run = unfinished_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n" + json.dumps(run.lines[0])[:20])
    assert audit(tmp_path) == []


def test_a_queued_group_without_its_payload_is_named(tmp_path):
    unfinished_run(tmp_path)
    for segment in (tmp_path / "payloads").iterdir():
        segment.unlink()
    assert named(tmp_path, "a group that may still be trained has its payload")


def test_a_torn_payload_segment_is_named(tmp_path):
    unfinished_run(tmp_path)
    [segment] = (tmp_path / "payloads").iterdir()
    segment.write_bytes(segment.read_bytes()[:-1])
    assert named(tmp_path, "a group that may still be trained has its payload")
