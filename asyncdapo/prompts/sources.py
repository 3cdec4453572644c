"""Data files. In: a JSONL or parquet file. Out: the wanted columns of its records, each with its place in the file.

Every problem of a user's file becomes one ConfigError: no such file, another file type, a line that isn't JSON or
UTF-8, a missing column, no records. Does not own: what the values mean (the task).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from asyncdapo.errors import ConfigError

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "ground_truth", "solution")
USUAL = {"prompts.prompt_column": PROMPT_COLUMNS, "prompts.answer_column": ANSWER_COLUMNS}
MISSING = object()
LEFT_OUT = "`asyncdapo data prepare` leaves such rows out"
MAKES_ONE = "`asyncdapo data prepare` makes one of a data set"


@dataclass(frozen=True, slots=True)
class Record:
    """The wanted values of one record. `place`, for messages: "line 3" or "row 2"."""

    place: str
    values: tuple[object, ...]
    optional: object = None
    """Value of the optional column; None if the record doesn't have it."""


def read_records(key: str, path: str, columns: Mapping[str, str], optional: str | None = None) -> list[Record]:
    """Read all records of a data file.

    `key`: the configuration key that holds `path`. `columns`: for each configuration key, the column that it names; a
    record's values have this order. `optional`: a column that may be missing. Raises ConfigError.
    """
    try:
        match Path(path).suffix.lower():
            case ".jsonl":
                records = list(_read_jsonl(key, path, columns, optional))
            case ".parquet":
                records = list(_read_parquet(path, columns, optional))
            case _:
                raise ConfigError(key, "must end in .jsonl or .parquet", path)
    except FileNotFoundError:
        raise ConfigError(key, "no such file", path, f"name yours: {key}=train.jsonl; {MAKES_ONE}") from None
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise ConfigError(key, f"can't be read: {str(error).splitlines()[0]}", path) from error
    if not records:
        raise ConfigError(key, "holds no record", path)
    return records


def _read_jsonl(key: str, path: str, columns: Mapping[str, str], optional: str | None) -> Iterator[Record]:
    checked = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _parse(key, path, number, line)
                if not checked:
                    _check_columns(keys_of(record), columns, f"{path}:{number}")
                    checked = True
                if missing := [column for column in columns.values() if value_at(record, column) is MISSING]:
                    raise ConfigError(key, f"line {number} has no {missing[0]!r}", path, LEFT_OUT)
                yield Record(f"line {number}", _values(record, columns), record.get(optional) if optional else None)


def _parse(key: str, path: str, number: int, line: bytes) -> dict[str, object]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"line {number} isn't UTF-8: {error.reason} at byte {error.start}"
        raise ConfigError(key, problem, path, LEFT_OUT) from error
    except (ValueError, RecursionError) as error:  # bad syntax, or a number that is too long for Python
        raise ConfigError(key, f"line {number} isn't JSON: {error}", path, LEFT_OUT) from error
    if not isinstance(record, dict):
        problem = f"line {number} must be a JSON object, it is a {type(record).__name__}"
        raise ConfigError(key, problem, path, LEFT_OUT)
    return record


def _read_parquet(path: str, columns: Mapping[str, str], optional: str | None) -> Iterator[Record]:
    with parquet.ParquetFile(path) as file:
        present = [name for field in file.schema_arrow for name in names_of(field)]
        _check_columns(present, columns, path)
        wanted = dict.fromkeys([*columns.values(), *({optional} & set(present))])
        table = file.read(columns=list(wanted))
    for row, record in enumerate(table.to_pylist()):
        yield Record(f"row {row}", _values(record, columns), record.get(optional) if optional else None)


def _values(record: Mapping[str, object], columns: Mapping[str, str]) -> tuple[object, ...]:
    values = (value_at(record, column) for column in columns.values())
    return tuple(None if value is MISSING else value for value in values)  # missing: the outer parquet value is null


def value_at(record: Mapping[str, object], column: str) -> object:
    """The value of a column; a dotted name reaches into objects. MISSING if there is none."""
    if column in record:
        return record[column]
    outer, dot, inner = column.partition(".")
    within = record.get(outer) if dot else None
    return value_at(within, inner) if isinstance(within, Mapping) else MISSING


def keys_of(record: Mapping[str, object]) -> Iterator[str]:
    """Names of columns, with dotted names for those inside objects."""
    for name, value in record.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in keys_of(value))


def names_of(field: pyarrow.Field) -> Iterator[str]:
    """As `keys_of`, for a parquet column."""
    yield field.name
    if pyarrow.types.is_struct(field.type):
        yield from (f"{field.name}.{name}" for inner in field.type for name in names_of(inner))


def _check_columns(present: Iterable[str], columns: Mapping[str, str], where: str) -> None:
    present = list(present)
    for key, column in columns.items():
        if column not in present:
            of_others = set(columns.values())
            likely = likely_column(column, [name for name in present if name not in of_others], USUAL[key])
            fix = f"{key}={likely}" if likely else ""
            raise ConfigError(key, f"no such column in {where}, which has {', '.join(present) or 'none'}", column, fix)


def likely_column(named: str, present: Sequence[str], usual: Sequence[str]) -> str | None:
    """The column that the user may have meant: the same name inside an object, a similar spelling, or a usual name."""
    inside = [name for name in present if name.endswith(f".{named}")]
    near = inside or difflib.get_close_matches(named, present, n=1)
    usual = [*usual, *(name for name in present for last in usual if name.endswith(f".{last}"))]
    return near[0] if near else first_of(present, usual)


def first_of(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    """The first of the usual names that is present, ignoring case."""
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in usual if name in by_name), None)
