"""Checkpoint directories: whole or absent, the newest few kept, and the one from which a run resumes. No torch here.

    RUN_DIR/checkpoints/step-000036/          config.json, model.safetensors, tokenizer files: a Hugging Face model
                        step-000036/exp_avg, exp_avg_sq/   the optimizer's averages, in the same format
                        step-000036/learner.pt             all else that only the learner reads
                        step-000036/checkpoint.json        the manifest: step, branch, ranks, digests of every byte
                        undone-step-000048/   set aside: damaged, or of a future that was undone

`begin_checkpoint` makes a directory under a hidden name, all ranks write their pieces into it, `commit_checkpoint`
gives it its name once all have: everything on disk first, then one rename. Names that begin with a dot are unfinished
or on their way out, left by a process that died; the next write removes them. Invariants: one writer per run directory;
a checkpoint is used only when every byte is as it was written, and only when the ledger knows its step and branch: one
of an abandoned future, or one that outlived its ledger, is as useless as a damaged one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncdapo import faults
from asyncdapo.disk import disk_errors, sha256_of, sync
from asyncdapo.errors import RunError, UserError

MANIFEST = "checkpoint.json"
STATE_FILE = "learner.pt"
"""Version, counts of the optimizer, random state."""
AVERAGES = ("exp_avg", "exp_avg_sq")
"""Folders of the optimizer's averages, as AdamW calls them."""
LEARNERS_OWN = (MANIFEST, STATE_FILE, *AVERAGES)
"""What only the learner reads. The rest is a model in Hugging Face format."""
MANIFEST_SCHEMA = 2
STEP_NAME = re.compile(r"step-(\d{6,})")


class Piece(msgspec.Struct, frozen=True):
    """Bytes of a file that one rank has written."""

    file: str
    """Below the checkpoint's directory."""
    offset: int
    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """RUN_DIR/checkpoints/step-…/checkpoint.json, written after all other files of the checkpoint."""

    schema: int
    step: int
    branch: int
    """Branch in which batch `step` was trained."""
    num_ranks: int
    num_shards: int
    """Of the learner that wrote it; one of other numbers reads it as well."""
    pieces: list[Piece]
    """Every byte of every file, once."""
    counters: dict[str, int]
    """What the run had used up when it was written (`gen_batches`, `prompts_consumed`, `train_steps`), for people: a
    run that resumes counts from its ledger."""


class Found(NamedTuple):
    """Where a run resumes from."""

    step: int
    path: Path | None
    """None: from the initial model, since no checkpoint was ever written."""
    problems: list[str]
    """Newer checkpoints that can't be used, and why."""


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands once it is whole."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


# ------------------------------------------------------------------------------------------------------------- writing


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """Make an empty directory for the checkpoint of `step`, which all ranks fill. Raises DiskError."""
    unfinished = unfinished_dir(run_dir, step)
    with disk_errors(checkpoint_dir(run_dir, step)):
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(unfinished.parent)
        unfinished.mkdir()
    return unfinished


def unfinished_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written."""
    return checkpoint_dir(run_dir, step).with_name(f".step-{step:06d}.new")


def commit_checkpoint(
    run_dir: Path,
    step: int,
    branch: int,
    written: Sequence[Piece] = (),
    *,
    num_ranks: int = 1,
    num_shards: int = 1,
    counters: Mapping[str, int] | None = None,
) -> Path:
    """Give the directory that was filled the checkpoint's name; one of the same step is replaced. `written`: the pieces
    of all ranks; other files are taken as they are. Raises DiskError; then those that were there are there. Raises
    RunError where the pieces of a file leave a gap."""
    unfinished, final = unfinished_dir(run_dir, step), checkpoint_dir(run_dir, step)
    with disk_errors(final):
        pieces = sorted([*written, *_others(unfinished, written)], key=lambda piece: (piece.file, piece.offset))
        if wrong := _wrong_sizes(unfinished, pieces):
            raise RunError(f"the checkpoint of step {step} was not written whole: {'; '.join(wrong)}")
        manifest = Manifest(
            schema=MANIFEST_SCHEMA,
            step=step,
            branch=branch,
            num_ranks=num_ranks,
            num_shards=num_shards,
            pieces=pieces,
            counters=dict(counters or {}),
        )
        (unfinished / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        _sync_tree(unfinished)
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
    """Rename what a run that resumes from `after_step` leaves behind, so that it neither counts as one of the newest
    nor is ever resumed from. Returns the new names; one that an earlier rollback set aside makes room."""
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


def check_checkpoint(path: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint; nothing when every byte is as it was written. `num_parts`
    readers may share the work: each digests its part of the bytes."""
    try:
        manifest = _read_manifest(path)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} can't be read ({error})"]
    if manifest.schema != MANIFEST_SCHEMA:
        return [f"{MANIFEST} has schema {manifest.schema}, this program reads {MANIFEST_SCHEMA}"]
    wrong = _wrong_sizes(path, manifest.pieces)
    if not wrong:
        damaged = (_damage(path, piece) for piece in manifest.pieces[part::num_parts])
        wrong = list(dict.fromkeys(problem for problem in damaged if problem))
    if checkpoint_dir(Path(), manifest.step).name != path.name:
        wrong.append(f"{MANIFEST} is of step {manifest.step}")
    return wrong


def _wrong_sizes(directory: Path, pieces: Sequence[Piece]) -> list[str]:
    """Of pieces in the order of their files and offsets."""
    wrong = []
    for file, of_file in groupby(pieces, key=lambda piece: piece.file):
        end = 0
        for piece in of_file:
            if piece.offset != end:
                place = f"at byte {min(piece.offset, end):,}"
                wrong.append(f"{file} was written by nobody, or more than once, {place}")
                break
            end += piece.num_bytes
        else:
            wrong += _wrong_size(directory / file, file, end)
    return wrong


def _wrong_size(path: Path, file: str, written: int) -> Iterator[str]:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != written:
            yield f"{file} has {num_bytes:,} bytes, {written:,} were written"
    except FileNotFoundError:
        yield f"{file} is missing"
    except OSError as error:
        yield f"{file} can't be read ({error.strerror})"


def _damage(directory: Path, piece: Piece) -> str:
    try:
        same = sha256_of(directory / piece.file, piece.offset, piece.num_bytes) == piece.sha256
        return "" if same else f"{piece.file} is damaged (another sha256 than was written)"
    except OSError as error:
        return f"{piece.file} can't be read ({error.strerror})"


def _others(directory: Path, written: Iterable[Piece]) -> list[Piece]:
    """Files that rank 0 has written as a whole."""
    known = {piece.file for piece in written}
    files = {path.relative_to(directory).as_posix(): path.stat().st_size for path in _files(directory)}
    return [
        Piece(file, 0, num_bytes, sha256_of(directory / file)) for file, num_bytes in files.items() if file not in known
    ]


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _unknown_to_ledger(path: Path, trained: Mapping[int, int]) -> list[str]:
    manifest = _read_manifest(path)
    if manifest.step == 0 or trained.get(manifest.step) == manifest.branch:
        return []
    return [f"the ledger has no batch {manifest.step} of branch {manifest.branch}"]


def _read_manifest(path: Path) -> Manifest:
    return msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)


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
