"""Rows: the records of JSONL and parquet files, one after the other. An unreadable row carries the reason.

In: a file. Out: `RawRow`s in the order of the file, at most a batch in memory. A row that can't be read raises when its
record is asked for; a file that can't be read raises UserError. Does not own: what the values mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NoReturn

import msgspec
import pyarrow
from pyarrow import parquet

from asyncdapo.errors import UserError
from asyncdapo.prompts.sources import keys_of, names_of

BATCH = 4096
"""Rows of parquet in memory at once."""
SAMPLE = 10_000
"""JSONL rows that are read to find the names of the columns."""
BEYOND_PYTHON = (ValueError, OverflowError, LookupError)
"""What Python can't represent: broken UTF-8, nanoseconds, a year after 9999, an unknown time zone."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One record. `place` is "line 3" or "row 2"; `digest` is the same for identical rows."""

    place: str
    digest: bytes
    read: Callable[[], Mapping[str, object]]
    """Returns the record. Raises ValueError with the reason why it can't be used."""
    line: bytes = b""
    """JSONL: the line as it is in the file."""


def read_rows(path: Path) -> Iterator[RawRow]:
    """All rows of a file. Raises UserError for a file that can't be read."""
    try:
        yield from _parquet_rows(path) if path.suffix.lower() == ".parquet" else _jsonl_rows(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: can't be read: {str(error).splitlines()[0]}") from error


def num_rows(path: Path) -> int | None:
    """The count in a parquet file's metadata; None for JSONL."""
    return parquet.read_metadata(path).num_rows if path.suffix.lower() == ".parquet" else None


def column_names(path: Path) -> list[str]:
    """Names of columns, dotted inside objects: all of a parquet file, those of the first SAMPLE rows of JSONL."""
    names: dict[str, None] = {}
    try:
        if path.suffix.lower() == ".parquet":
            for field in parquet.read_schema(path):
                names |= dict.fromkeys(names_of(field))
            return list(names)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: can't be read: {str(error).splitlines()[0]}") from error
    for row in islice(read_rows(path), SAMPLE):
        try:
            names |= dict.fromkeys(keys_of(row.read()))
        except ValueError:
            continue
    return list(names)


# ---------------------------------------------------------------------------------------------------------------- JSONL


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if line:
                yield RawRow(f"line {number}", _digest(line), lambda line=line: _parse(line), line)


def _parse(line: bytes) -> dict[str, object]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"isn't UTF-8: {error.reason} at byte {error.start}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"isn't JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, it is a {type(record).__name__}")
    return record


# -------------------------------------------------------------------------------------------------------------- parquet


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    first = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH):
            for offset, record in enumerate(_records(batch)):
                place = f"row {first + offset}"
                if isinstance(record, dict):
                    yield RawRow(
                        place, _digest(msgspec.msgpack.encode(record, enc_hook=repr)), lambda record=record: record
                    )
                else:
                    yield RawRow(place, _digest(f"{path} {place}".encode()), lambda reason=record: _refuse(reason))
            first += len(batch)


def _records(batch: pyarrow.RecordBatch) -> Iterator[dict[str, object] | str]:
    """Each record of a batch, or the reason why it can't be read: text in parquet may be broken UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except BEYOND_PYTHON:  # raised by one or more values: convert them one by one
        pass
    for row in range(len(batch)):
        try:
            yield {name: _value(column[row]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        except UnicodeDecodeError as error:
            yield f"isn't UTF-8: {error.reason} at byte {error.start}"


def _value(scalar: pyarrow.Scalar) -> object:
    """As a Python value. Values without one, such as dates with nanoseconds, become (type, stored number)."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except BEYOND_PYTHON:
        return str(scalar.type), getattr(scalar, "value", None)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()
