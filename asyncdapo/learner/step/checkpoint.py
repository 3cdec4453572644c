"""Checkpoint directories: whole or absent, the newest few kept, and the one that a run goes on from. No torch here.

    RUN_DIR/checkpoints/step-000036/          config.json, model.safetensors, tokenizer files, learner.pt
                        step-000036/checkpoint.json    the manifest: step, branch, size and sha256 of every file
                        undone-step-000048/   set aside: damaged, or of a future that was undone

What is in one is written by a function that gets an empty directory; this module makes it appear under its name at
once (everything on disk first, then one rename) and removes old ones. Names that begin with a dot are unfinished or on
their way out, left by a process that died; the next write removes them. Invariants: one writer per run directory; a
checkpoint is used only when every byte is as it was written, and only when the ledger knows its step and branch: one of
an abandoned future, or one that outlived its ledger, is as useless as a damaged one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncdapo import faults
from asyncdapo.disk import disk_errors, sha256_of, sync
from asyncdapo.errors import UserError

MANIFEST = "checkpoint.json"
STATE_FILE = "learner.pt"
"""What only the learner reads: version, optimizer, random state. The rest is a model in Hugging Face format."""
MANIFEST_SCHEMA = 1
STEP_NAME = re.compile(r"step-(\d{6,})")


class FileFacts(msgspec.Struct, frozen=True):
    """What a file of a checkpoint must still be."""

    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """RUN_DIR/checkpoints/step-…/checkpoint.json, written after all other files of the checkpoint."""

    schema: int
    step: int
    branch: int
    """Branch in which batch `step` was trained."""
    files: dict[str, FileFacts]
    counters: dict[str, int] = {}
    """What the run had used up when it was written (`gen_batches`, `prompts_consumed`, `train_steps`), for people: a
    run that goes on counts from its ledger. Empty in checkpoints of before."""


class Found(NamedTuple):
    """Where a run goes on from."""

    step: int
    path: Path | None
    """None: from the initial model, since no checkpoint was ever written."""
    problems: list[str]
    """Newer checkpoints that can't be used, and why."""


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands once it is whole."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


# ------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    run_dir: Path, step: int, branch: int, write: Callable[[Path], None], counters: Mapping[str, int] | None = None
) -> Path:
    """Fill a directory with `write` and give it the checkpoint's name; one of the same step is replaced. `counters`
    stand in its manifest. Raises DiskError; then those that were there are there."""
    final = checkpoint_dir(run_dir, step)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(final.parent)
        unfinished = final.with_name(f".{final.name}.new")
        unfinished.mkdir()
        write(unfinished)
        _write_manifest(unfinished, step, branch, counters or {})
        _sync_tree(unfinished)
        faults.disk_write(sum(path.stat().st_size for path in unfinished.rglob("*")))
        faults.point("in_checkpoint")
        if final.exists():
            _remove(final)
        unfinished.rename(final)
        sync(final.parent)
    return final


def remove_old_checkpoints(run_dir: Path, keep: int) -> None:
    """Keep step 0 and the `keep` newest others; 0 keeps all."""
    if keep == 0:
        return
    for step in [step for step in kept_steps(run_dir) if step > 0][:-keep]:
        _remove(checkpoint_dir(run_dir, step))


def set_aside(run_dir: Path, after_step: int) -> list[str]:
    """Rename what a run that goes on from `after_step` leaves behind, so that it neither counts as one of the newest
    nor is ever gone on from. Returns the new names; one that an earlier rollback set aside makes room."""
    _remove_unfinished(run_dir / "checkpoints")
    names = []
    for step in [step for step in kept_steps(run_dir) if step > after_step]:
        left = checkpoint_dir(run_dir, step)
        aside = left.with_name(f"undone-{left.name}")
        if aside.exists():
            _remove(aside)
        left.rename(aside)
        names.append(aside.name)
    return names


# ------------------------------------------------------------------------------------------------------------- reading


def kept_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint under its name, rising."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(STEP_NAME.fullmatch, names) if match)


def oldest_kept(run_dir: Path) -> int:
    """The first step that a run may still be resumed from, step 0 left out; 0 when there is no other."""
    return next((step for step in kept_steps(run_dir) if step > 0), 0)


def find_checkpoint(run_dir: Path, trained: Mapping[int, int]) -> Found:
    """The newest checkpoint that is whole and that the ledger knows: `trained` is the branch of each batch in it. That
    of step 0 needs no batch. Raises UserError when there are checkpoints and none can be used."""
    problems: list[str] = []
    steps = kept_steps(run_dir)
    for step in reversed(steps):
        path = checkpoint_dir(run_dir, step)
        wrong = check_checkpoint(path) or _unknown_to_ledger(path, trained)
        if not wrong:
            return Found(step, path, problems)
        problems.append(f"{path.name}: {'; '.join(wrong)}")
    if steps:
        raise UserError(
            f"{run_dir / 'checkpoints'}: no checkpoint can be used: {' · '.join(problems)} "
            "(put a sound copy of one back, or begin anew with another run.dir)"
        )
    if trained:
        problems.append(f"no checkpoint was written: {max(trained)} train steps are lost")
    return Found(0, None, problems)


def check_checkpoint(path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint; nothing when every byte is as it was written."""
    try:
        manifest = _read_manifest(path)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} can't be read ({error})"]
    if manifest.schema != MANIFEST_SCHEMA:
        return [f"{MANIFEST} has schema {manifest.schema}, this program reads {MANIFEST_SCHEMA}"]
    wrong = [_check_file(path / name, facts) for name, facts in manifest.files.items()]
    if checkpoint_dir(Path(), manifest.step).name != path.name:
        wrong.append(f"{MANIFEST} is of step {manifest.step}")
    return [problem for problem in wrong if problem]


def _check_file(path: Path, facts: FileFacts) -> str:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != facts.num_bytes:
            return f"{path.name} has {num_bytes:,} bytes, {facts.num_bytes:,} were written"
        return "" if sha256_of(path) == facts.sha256 else f"{path.name} is damaged (another sha256 than was written)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} can't be read ({error.strerror})"


def _unknown_to_ledger(path: Path, trained: Mapping[int, int]) -> list[str]:
    manifest = _read_manifest(path)
    if manifest.step == 0 or trained.get(manifest.step) == manifest.branch:
        return []
    return [f"the ledger has no batch {manifest.step} of branch {manifest.branch}"]


def _read_manifest(path: Path) -> Manifest:
    return msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)


def _write_manifest(directory: Path, step: int, branch: int, counters: Mapping[str, int]) -> None:
    files = {
        path.relative_to(directory).as_posix(): FileFacts(path.stat().st_size, sha256_of(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(schema=MANIFEST_SCHEMA, step=step, branch=branch, files=files, counters=dict(counters))
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _remove(directory: Path) -> None:
    """Take the name away first, so that a directory with a checkpoint's name is never half there."""
    leaving = directory.with_name(f".{directory.name}.old")
    directory.rename(leaving)
    shutil.rmtree(leaving)


def _remove_unfinished(parent: Path) -> None:
    for pattern in (".step-*", ".undone-step-*"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
