"""RUN_DIR/metrics.jsonl: one line for each train step, and one for step 0; metrics.undone.jsonl: lines that a rollback
undid.

In: the metrics of a step, name to number. Out: a JSON object per line, `step` first, then by name; integers stay
integers. NaN and infinity (a mean over nothing, a norm that overflowed) are written as null, so that any JSON reader
can read every line. A line reaches the operating system before `log` returns.

A rollback moves lines from the first file to the second. Each file is replaced by a rename, the one that gains lines
first. A process that dies between the two leaves lines in both files; the next rollback finds them in the second and
doesn't add them again. Invariants: steps only rise; no line is lost, and none is in a file twice. Does not own: what
the names mean (`docs/metrics.md`); to which step a run is rolled back.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from asyncdapo.disk import replace_file

FILE_NAME = "metrics.jsonl"
UNDONE_NAME = "metrics.undone.jsonl"
UNDONE_BY = "undone_by"
"""Key of an undone line: the branch whose rollback undid it."""

logger = logging.getLogger("metrics")


class MetricsFile:
    """Appends lines to a new file, or with `go_on` to that of a resumed run, which may be missing.

    Raises FileExistsError if there is a file and `go_on` is false."""

    def __init__(self, run_dir: Path, *, go_on: bool = False) -> None:
        self._run_dir, self._path = run_dir, run_dir / FILE_NAME
        self._file = self._path.open("a" if go_on else "x", encoding="utf-8")
        self.last_line: dict[str, float] = {}
        self.num_torn = 0
        """Lines that couldn't be read and are left out: the last one, if the writer died in it."""
        if go_on:
            lines, self.num_torn = whole_lines(run_dir)
            self._rewrite(lines)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one line. Raises ValueError unless its step is above the last one."""
        step = metrics["step"]
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} came after those of step {self._last_step}")
        self._file.write(_to_text([_to_record(metrics)]))
        self._file.flush()
        self.last_line = dict(metrics)

    def amend(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Add metrics to the last line. Returns the whole line."""
        lines, _ = whole_lines(self._run_dir)
        lines[-1] = _to_record(to_metrics(lines[-1]) | dict(metrics) | {"step": lines[-1]["step"]})
        self._rewrite(lines)
        return self.last_line

    def roll_back(
        self, step: int, undone_by: int, missing: Iterable[Mapping[str, float]] = ()
    ) -> tuple[list[int], list[dict]]:
        """Move the lines past `step` to metrics.undone.jsonl, signed by the branch that undoes them, and put in the
        `missing` ones of earlier steps that have none. Returns the steps that were undone and the lines that were put
        in, in order."""
        lines, _ = whole_lines(self._run_dir)
        undone = [line for line in lines if line["step"] > step]
        kept = {line["step"]: line for line in lines if line["step"] <= step}
        put_in = [dict(line) for line in missing if line["step"] <= step and line["step"] not in kept]
        if undone:
            _add_undone(self._run_dir, undone, undone_by)
            logger.info("lines after step %d moved to %s", step, UNDONE_NAME)
        lines = [*kept.values(), *map(_to_record, put_in)]
        self._rewrite(sorted(lines, key=lambda line: line["step"]))
        return [int(line["step"]) for line in undone], put_in

    def close(self) -> None:
        self._file.close()

    @property
    def _last_step(self) -> float:
        return self.last_line.get("step", -1)

    def _rewrite(self, lines: list[dict]) -> None:
        """Replace the file by these lines, and open it for more."""
        self._file.close()
        replace_file(self._path, _to_text(lines).encode())
        self._file = self._path.open("a", encoding="utf-8")
        self.last_line = to_metrics(lines[-1]) if lines else {}


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All lines, null as NaN. A cut last line (the writer died in it) is left out."""
    lines = (run_dir / FILE_NAME).read_text(encoding="utf-8").split("\n")[:-1]
    return [to_metrics(json.loads(line)) for line in lines]


def whole_lines(run_dir: Path, name: str = FILE_NAME) -> tuple[list[dict], int]:
    """The lines of a run that may have died at any time, and the number of unreadable ones. None if there is no
    file."""
    path = run_dir / name
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    records = [record for text in texts if (record := parse_line(text)) is not None]
    return records, sum(bool(text) for text in texts) - len(records)


def parse_line(text: str) -> dict | None:
    """A line of metrics.jsonl as written, null as None; None for one that isn't whole."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int | float) else None


def _add_undone(run_dir: Path, lines: list[dict], undone_by: int) -> None:
    """Every line has numbers of its own moment in it, so that the same line found there is this one."""
    there, _ = whole_lines(run_dir, UNDONE_NAME)
    known = {_to_text([{name: value for name, value in line.items() if name != UNDONE_BY}]) for line in there}
    new = [line | {UNDONE_BY: undone_by} for line in lines if _to_text([line]) not in known]
    replace_file(run_dir / UNDONE_NAME, _to_text([*there, *new]).encode())


def _to_record(metrics: Mapping[str, float]) -> dict[str, float | int | None]:
    names = ["step", *sorted(metrics.keys() - {"step"})]
    return {name: _number(metrics[name]) for name in names}


def to_metrics(record: Mapping[str, float | None]) -> dict[str, float]:
    """A line from its JSON, null as NaN."""
    return {name: math.nan if value is None else value for name, value in record.items()}


def _to_text(records: Iterable[Mapping[str, float | None]]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _number(value: float) -> float | int | None:
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None
