"""Checkpoints on disk: whole or absent, the newest kept, damage named, and which one a run resumes from."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from asyncdapo.errors import UserError
from asyncdapo.learner.storage.checkpoint import (
    check_checkpoint,
    checkpoint_dir,
    find_checkpoint,
    oldest_kept,
    remove_old_checkpoints,
    set_aside,
)
from tests.learner.storage import written


def write_checkpoint(run_dir, step, write, branch=0):
    return written.write_checkpoint(run_dir, step, branch, write)


def write_note(text):
    return lambda directory: (directory / "note").write_text(text)


def write_steps(run_dir, *steps, branch=0):
    return [write_checkpoint(run_dir, step, write_note(f"note of {step}"), branch) for step in steps]


def names(run_dir):
    return sorted(os.listdir(run_dir / "checkpoints"))


def test_a_checkpoint_whose_writing_fails_never_appears(tmp_path):
    def fail(directory):
        write_note("half")(directory)
        raise OSError("disk full")

    write_checkpoint(tmp_path, 4, write_note("four"))
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 8, fail)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["step-000004"]
    write_checkpoint(tmp_path, 8, write_note("eight"))
    assert names(tmp_path) == ["step-000004", "step-000008"]
    assert (tmp_path / "checkpoints/step-000008/note").read_text() == "eight"


def test_a_checkpoint_has_no_name_while_it_is_written(tmp_path):
    seen = []
    write_checkpoint(tmp_path, 4, lambda directory: seen.extend(names(tmp_path)))
    assert [name for name in seen if not name.startswith(".")] == []
    assert names(tmp_path) == ["step-000004"]


def test_the_manifest_says_what_the_run_had_used_up(tmp_path):
    counters = {"gen_batches": 9, "prompts_consumed": 150, "train_steps": 4}
    path = written.write_checkpoint(tmp_path, 4, 0, write_note("four"), counters)
    assert json.loads((path / "checkpoint.json").read_text())["counters"] == counters
    assert check_checkpoint(path) == []


def test_writing_the_same_step_again_replaces_it(tmp_path):
    for text in ("old", "new"):
        path = write_checkpoint(tmp_path, 12, write_note(text))
    assert (path / "note").read_text() == "new"
    assert names(tmp_path) == ["step-000012"]


@pytest.mark.parametrize(("keep", "kept"), [(1, [0, 30]), (2, [0, 20, 30]), (9, [0, 10, 20, 30]), (0, [0, 10, 20, 30])])
def test_step_zero_and_the_newest_are_kept(tmp_path, keep, kept):
    for step in (0, 10, 20, 30):
        write_checkpoint(tmp_path, step, write_note(str(step)))
    remove_old_checkpoints(tmp_path, keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in kept]


def test_steps_past_six_digits_stay_in_order(tmp_path):
    for step in (999_999, 1_000_000):
        write_checkpoint(tmp_path, step, write_note(str(step)))
    remove_old_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["step-1000000"]


def test_torch_is_not_imported_to_look_at_checkpoints():
    code = "import sys, asyncdapo.learner.storage.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------- damage


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: cut_short(path / "note"), "note has 6 bytes, 9 were written"),
        (lambda path: flip_a_byte(path / "note"), "note is damaged"),
        (lambda path: (path / "note").unlink(), "note is missing"),
        (lambda path: (path / "checkpoint.json").unlink(), "checkpoint.json is missing"),
        (lambda path: cut_short(path / "checkpoint.json"), "checkpoint.json can't be read"),
        (lambda path: (path / "checkpoint.json").write_text('{"schema": 1}'), "checkpoint.json can't be read"),
        (lambda path: path.rename(path.with_name("step-000007")), "checkpoint.json is of step 4"),
    ],
)
def test_a_checkpoint_that_is_not_as_it_was_written_is_named_with_what_is_wrong(tmp_path, damage, words):
    (path,) = write_steps(tmp_path, 4)
    assert check_checkpoint(path) == []
    damage(path)
    (path,) = (tmp_path / "checkpoints").glob("step-*")
    (problem,) = check_checkpoint(path)
    assert words in problem


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named(tmp_path):
    write_steps(tmp_path, 0, 10, 20, 30, 40)
    trained = dict.fromkeys(range(1, 45), 0)
    assert find_checkpoint(tmp_path, trained) == (40, checkpoint_dir(tmp_path, 40), [])
    flip_a_byte(checkpoint_dir(tmp_path, 40) / "note")
    (checkpoint_dir(tmp_path, 30) / "checkpoint.json").unlink()
    found = find_checkpoint(tmp_path, trained)
    assert (found.step, found.path) == (20, checkpoint_dir(tmp_path, 20))
    assert [problem.split(":")[0] for problem in found.problems] == ["step-000040", "step-000030"]
    assert "checkpoint.json is missing" in found.problems[1]


def test_a_checkpoint_that_the_ledger_does_not_know_is_of_an_abandoned_future(tmp_path):
    write_steps(tmp_path, 0, 10, 20)
    (without_20, of_another_branch) = ({10: 0}, {10: 0, 20: 1})
    for trained in (without_20, of_another_branch):
        found = find_checkpoint(tmp_path, trained)
        assert found.step == 10
        assert found.problems == ["step-000020: the ledger has no batch 20 of branch 0"]
    write_steps(tmp_path, 20, branch=1)
    assert find_checkpoint(tmp_path, of_another_branch).step == 20
    assert find_checkpoint(tmp_path, {}).step == 0


def test_a_run_that_never_wrote_a_checkpoint_begins_with_the_initial_model(tmp_path):
    assert find_checkpoint(tmp_path, {}) == (0, None, [])
    step, path, problems = find_checkpoint(tmp_path, {1: 0, 2: 0})
    assert (step, path) == (0, None)
    assert problems == ["no checkpoint was written: 2 train steps are lost"]


def test_a_run_all_of_whose_checkpoints_are_damaged_is_not_begun_anew_in_silence(tmp_path):
    for path in write_steps(tmp_path, 0, 10):
        cut_short(path / "note")
    with pytest.raises(UserError, match=r"step-000010: note has .* step-000000: note has .* another run.dir"):
        find_checkpoint(tmp_path, {10: 0})


def test_what_a_rollback_leaves_behind_is_set_aside_and_does_not_count_as_newest(tmp_path):
    for text in ("first future", "second future"):
        write_steps(tmp_path, 0, 10, 20)
        write_checkpoint(tmp_path, 30, write_note(text))
        assert set_aside(tmp_path, 10) == ["undone-step-000020", "undone-step-000030"]
        assert names(tmp_path) == ["step-000000", "step-000010", "undone-step-000020", "undone-step-000030"]
    assert (tmp_path / "checkpoints/undone-step-000030/note").read_text() == "second future"
    remove_old_checkpoints(tmp_path, keep=1)
    assert find_checkpoint(tmp_path, {10: 0}).step == 10


def test_the_oldest_kept_checkpoint_is_the_first_that_may_be_resumed_from(tmp_path):
    assert oldest_kept(tmp_path) == 0
    write_steps(tmp_path, 0)
    assert oldest_kept(tmp_path) == 0
    write_steps(tmp_path, 10, 20, 30)
    remove_old_checkpoints(tmp_path, keep=2)
    assert oldest_kept(tmp_path) == 20


# ------------------------------------------------------------------------------------------------------------- kill -9

WRITER = """
import sys
from pathlib import Path
from asyncdapo.learner.storage.checkpoint import remove_old_checkpoints
from tests.learner.storage.written import write_checkpoint

def write(directory):
    for name in "abc":
        (directory / name).write_bytes(bytes([step % 256]) * 200_000)

run_dir, step = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    write_checkpoint(run_dir, step, 0, write)
    remove_old_checkpoints(run_dir, 2)
"""


def test_a_writer_killed_at_any_moment_leaves_the_checkpoint_before_and_the_next_one_resumes(tmp_path):
    rng, seen = random.Random(0), []
    write_steps(tmp_path, 0)
    for _ in range(12):
        step = find_checkpoint(tmp_path, dict.fromkeys(range(10_000), 0)).step
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(step)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.06))
        writer.kill()
        writer.communicate()
        found = find_checkpoint(tmp_path, dict.fromkeys(range(10_000), 0))
        assert found.problems == []
        assert found.step >= step
        assert len({content for path in found.path.glob("[abc]") for content in path.read_bytes()}) <= 1
        seen += names(tmp_path)
    assert found.step > 0
    assert any(name.startswith(".") for name in seen), "no kill fell into the writing"
