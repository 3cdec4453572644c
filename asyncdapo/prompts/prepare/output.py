"""Output: a directory of prepared data, either complete or absent.

    DIR/train.parquet, test.parquet, …   columns prompt, answer, source (text), row (number in the input)
        unusable.jsonl                   rows that can't be used: number, file, place, reason, shortened value
        manifest.json                    what it was made from, counts of every stage, digests of the files above

Everything is written to a directory next to DIR, by one process at a time, and then renamed. The same input and options
give the same bytes. Does not own: what the files contain.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import compute, parquet
from pyarrow.parquet import ParquetWriter

from asyncdapo.disk import LockedError, lock_file, replace_file, sha256_of
from asyncdapo.errors import UserError
from asyncdapo.prompts.prepare.sieve import KeptRow

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
UNUSABLE = "unusable.jsonl"
SCHEMA = pyarrow.schema(
    [("prompt", pyarrow.string()), ("answer", pyarrow.string()), ("source", pyarrow.string()), ("row", pyarrow.int64())]
)
ROWS_AT_ONCE = 1024


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """None where nothing was prepared yet. Raises UserError for a directory that holds something else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != MANIFEST_SCHEMA:
            raise UserError(f"--out {directory}: another version of asyncdapo prepared it (choose another directory)")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = "holds something that `asyncdapo data prepare` didn't write"
        raise UserError(f"--out {directory}: {problem} (choose another directory, or empty it)") from error


def is_whole(directory: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the files are as the manifest describes them."""
    files = {name: directory / name for name in manifest["files"]}
    return all(path.is_file() and digest_of(path) == manifest["files"][name]["sha256"] for name, path in files.items())


def check_replaceable(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError for a directory with files that the manifest doesn't list."""
    others = {path.name for path in directory.iterdir()} - {MANIFEST, *manifest["files"]}
    if others:
        problem = f"holds {', '.join(sorted(others))}, which `asyncdapo data prepare` didn't write"
        raise UserError(f"--out {directory}: {problem} (choose another directory, or move that)")


def digest_of(path: Path) -> str:
    """Raises UserError for a file that can't be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


@contextmanager
def begin(directory: Path) -> Iterator[Path]:
    """An empty directory next to it, removed at the end; first removes what a killed job left there. Raises UserError
    if it can't be written, and while another process prepares the same directory."""
    unfinished = directory.with_name(f".{directory.name}.new")
    lock = directory.with_name(f".{directory.name}.lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(lock):
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                yield unfinished
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
                lock.unlink()
    except LockedError as holder:
        problem = f"another process prepares it, {holder} (wait, or choose another directory)"
        raise UserError(f"--out {directory}: {problem}") from None
    except OSError as error:
        raise UserError(f"--out {directory}: can't be written ({error.strerror or error})") from error


def write_rows(path: Path, rows: Iterable[KeptRow]) -> None:
    """Write the rows as parquet, ROWS_AT_ONCE at a time."""
    with ParquetWriter(path, SCHEMA) as writer:
        rows = iter(rows)
        while some := list(islice(rows, ROWS_AT_ONCE)):
            columns = {name: [getattr(row, name) for row in some] for name in SCHEMA.names}
            writer.write_table(pyarrow.table(columns, schema=SCHEMA))


def move_rows(path: Path, to: Path, chosen: Set[int]) -> None:
    """Move rows, given by their places in the file, to a file of their own; one batch is in memory at a time."""
    rest, place = path.with_suffix(".rest"), 0
    with parquet.ParquetFile(path) as file, ParquetWriter(to, SCHEMA) as moved, ParquetWriter(rest, SCHEMA) as staying:
        for batch in file.iter_batches():
            moves = pyarrow.array([row in chosen for row in range(place, place + len(batch))], pyarrow.bool_())
            moved.write_batch(batch.filter(moves))
            staying.write_batch(batch.filter(compute.invert(moves)))  # pyright: ignore[reportAttributeAccessIssue] (made at import)
            place += len(batch)
    rest.replace(path)


def finish(unfinished: Path, directory: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest, and replace what an earlier preparation left. Returns the manifest."""
    files = {path.name: {"sha256": digest_of(path)} for path in sorted(unfinished.iterdir())}
    manifest = {"schema": MANIFEST_SCHEMA, "version": version("asyncdapo"), **facts, "files": files}
    replace_file(unfinished / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
    former = directory.with_name(f".{directory.name}.old")
    if former.exists():
        shutil.rmtree(former)
    if directory.exists():
        directory.rename(former)
    unfinished.rename(directory)
    if former.exists():
        shutil.rmtree(former)
    return manifest
