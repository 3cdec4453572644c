"""Data files: a JSONL or parquet file in, the wanted columns of its records out, each with its place in the file.

Every way in which a user's file can be wrong ends here as one ConfigError: no such file, another kind of file, a line
that isn't JSON or UTF-8, a column that isn't there, no record at all. What the values mean is the task's business.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from asyncdapo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Record:
    """The wanted values of one record; `place` is "line 3" or "row 2", for messages."""

    place: str
    values: tuple[object, ...]


def read_records(key: str, path: str, columns: Mapping[str, str]) -> list[Record]:
    """Read a data file whole.

    `key` is the configuration key that holds `path`; `columns` maps a configuration key to the column it names, and the
    values of a record are in its order. Raises ConfigError.
    """
    try:
        match Path(path).suffix.lower():
            case ".jsonl":
                records = list(_read_jsonl(key, path, columns))
            case ".parquet":
                records = list(_read_parquet(path, columns))
            case _:
                raise ConfigError(key, "must end in .jsonl or .parquet", path)
    except FileNotFoundError:
        raise ConfigError(key, "no such file", path) from None
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(key, f"can't be read: {str(error).splitlines()[0]}", path) from error
    if not records:
        raise ConfigError(key, "holds no record", path)
    return records


def _read_jsonl(key: str, path: str, columns: Mapping[str, str]) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Record(f"line {number}", _values(_parse(key, path, number, line), columns, f"{path}:{number}"))


def _parse(key: str, path: str, number: int, line: bytes) -> dict[str, object]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(key, f"line {number} isn't UTF-8: {error.reason} at byte {error.start}", path) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(key, f"line {number} isn't JSON: {error}", path) from error
    if not isinstance(record, dict):
        raise ConfigError(key, f"line {number} must be a JSON object, it is a {type(record).__name__}", path)
    return record


def _read_parquet(path: str, columns: Mapping[str, str]) -> Iterator[Record]:
    with parquet.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names, columns, path)
        table = file.read(columns=list(dict.fromkeys(columns.values())))
    for row, record in enumerate(table.to_pylist()):
        yield Record(f"row {row}", _values(record, columns, path))


def _values(record: Mapping[str, object], columns: Mapping[str, str], where: str) -> tuple[object, ...]:
    _check_columns(record, columns, where)
    return tuple(record[column] for column in columns.values())


def _check_columns(present: Iterable[str], columns: Mapping[str, str], where: str) -> None:
    present = list(present)
    for key, column in columns.items():
        if column not in present:
            nearest = difflib.get_close_matches(column, present, n=1, cutoff=0.0)
            fix = f"{key}={nearest[0]}" if nearest else ""
            raise ConfigError(key, f"no such column in {where}, which has {', '.join(present) or 'none'}", column, fix)
