"""Every file of a run, harmed in every way: the next launch says what is wrong with which file and what to do, or it
resumes soundly; and audit reports all of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncdapo.controller.checks.preflight import prepare_run
from asyncdapo.controller.process.roster import read as read_roster
from asyncdapo.errors import RunError, UserError
from asyncdapo.learner.storage.checkpoint import set_aside
from asyncdapo.metrics.jsonl import MetricsFile
from asyncdapo.replay.ledger.audit import audit, run_audit
from asyncdapo.replay.ledger.ledger import describe_unreadable
from tests.learner.storage.written import write_checkpoint
from tests.replay.small_run import SmallRun

KEYS = (
    "metrics.wandb=disabled",
    "replay.prompts_per_step=2",
    "replay.run_ahead=1",
    "replay.max_staleness=1",
    "rollout.group_size=2",
    "eval.num_prompts=0",
    "eval.num_greedy_prompts=0",
)
CHECKPOINT = "checkpoints/step-000002/"
HELD = "payloads/000002.bin"
"""Batch 3, with which the run resumes, is the first half of it."""
FILES = (
    "ledger.db",
    "ledger.db-wal",
    "ledger.db-shm",
    "payloads/000001.bin",
    HELD,
    CHECKPOINT + "checkpoint.json",
    CHECKPOINT + "weights",
    "metrics.jsonl",
    "identity.json",
    "processes.json",
    "config.yaml",
)


def truncate(content: bytearray, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def zero(content: bytearray, rng: random.Random) -> bytes:
    first = rng.randrange(len(content))
    last = min(len(content), first + rng.choice((1, 100, 5000)))
    content[first:last] = bytes(last - first)
    return content


def flip(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def empty(content: bytearray, rng: random.Random) -> bytes:
    return b""


def break_text(content: bytearray, rng: random.Random) -> bytes:
    """Every string of the JSON begins with a byte that no UTF-8 begins with."""
    return content.replace(b': "', b': "\xb6')


Harm = Callable[[bytearray, random.Random], bytes]
HARMS: tuple[Harm | None, ...] = (truncate, flip, empty, None)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every process was killed: four steps are trained, a batch is cut, groups wait; the newest checkpoint
    is of step 2. Part of its ledger is in the WAL."""
    run_dir = tmp_path_factory.mktemp("damaged") / "killed"
    with prepare_run("quickstart", [f"run.dir={run_dir}", *KEYS]):
        pass
    (run_dir / "processes.json").write_text("[\n]\n")
    run = SmallRun(run_dir, segment_bytes=1500)
    run.join(0)
    metrics = MetricsFile(run_dir)
    metrics.log({"step": 0, "time/wall_s": 0.0, "time/total_s": 1.0})
    save(run_dir, 0)
    for step in (1, 2, 3, 4):
        run.advance(0, step)
        metrics.log(run.lines[-1] | {"time/wall_s": 1.0 * step, "time/total_s": 1.0 + step})
        if step == 2:
            save(run_dir, 2)
            run.journal.fold()
    run.fill(0, versions=((4, 4),))
    run.answer(run.running(0)[0], versions=((4, 4),))
    killed = run_dir.with_name("base")
    shutil.copytree(run_dir, killed)
    run.journal.close()
    return killed


def save(run_dir: Path, step: int) -> None:
    write_checkpoint(run_dir, step, 0, lambda directory: (directory / "weights").write_text("whole"))


def go_on(run_dir: Path) -> str:
    """What the next launch does up to step 5: where it resumes, and what it says. Raises the error that ends it."""
    with prepare_run("quickstart", [f"run.dir={run_dir}", *KEYS]) as (_, resume):
        set_aside(run_dir, resume.step)
        run = SmallRun(run_dir)
        try:
            run.roll_back(resume.step)
            metrics = MetricsFile(run_dir, go_on=True)
            metrics.roll_back(resume.step, run.journal.branch, resume.missing_lines)
            for step in range(resume.step + 1, 6):
                if step not in run.state.cut_batches.untrained:
                    run.fill(0, versions=((step - 1, 4),))
                run.train(step)
                metrics.log(run.lines[-1])
            metrics.close()
            return "\n".join([*resume.describe(), describe_unreadable(run_dir, run.journal.branch)])
        finally:
            run.journal.close()


def test_the_run_as_it_was_killed_resumes_soundly(interrupted: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(interrupted, tmp_path / "run")
    assert audit(run_dir) == []
    assert go_on(run_dir) == "resumes after step 2, from checkpoints/step-000002\n"
    assert audit(run_dir) == []


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__ if harm else "remove")
@pytest.mark.parametrize("name", FILES)
def test_a_harmed_file_is_named_with_what_to_do_or_the_run_resumes_soundly(
    interrupted: Path, tmp_path: Path, name: str, harm: Harm | None
) -> None:
    for seed in range(2 if name == HELD else 1):
        launch_harmed(shutil.copytree(interrupted, tmp_path / f"run{seed}"), name, harm, seed)


@pytest.mark.parametrize("name", [CHECKPOINT + "checkpoint.json", "identity.json"])
def test_json_whose_text_is_none_is_named_as_any_other_damage(interrupted: Path, tmp_path: Path, name: str) -> None:
    run_dir = shutil.copytree(interrupted, tmp_path / "run")
    assert b': "' in (run_dir / name).read_bytes()
    launch_harmed(run_dir, name, break_text, 0)


def test_a_list_of_processes_whose_text_is_none_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "processes.json").write_bytes(b'[{"role":"\xb6"}]')
    with pytest.raises(UserError, match=r"processes.json is not a list of processes: .*\(remove it"):
        read_roster(tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FILES)
def test_many_more_harms(interrupted: Path, tmp_path: Path, name: str) -> None:
    for seed in range(1, 150):
        run_dir = shutil.copytree(interrupted, tmp_path / "run")
        try:
            launch_harmed(run_dir, name, random.Random(seed).choice((truncate, zero, flip)), seed)
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}")
            raise
        shutil.rmtree(run_dir)


def launch_harmed(run_dir: Path, name: str, harm: Harm | None, seed: int) -> None:
    path = run_dir / name
    if harm:
        path.write_bytes(harm(bytearray(path.read_bytes()), random.Random(f"{name} {seed}")))
    else:
        path.unlink()
    audit(run_dir)
    try:
        go_on(run_dir)
    except (UserError, RunError) as error:
        said = str(error)
        assert path.name in said, said
        assert "\n" not in said
        assert said.endswith(")"), "what to do"
    else:  # a number that is another one now is JSON as before: audit finds it
        found = [breach for breach in audit(run_dir) if name != "metrics.jsonl" or name not in breach]
        assert found == []
    run_audit(run_dir)
