"""RUN_DIR/metrics.jsonl: one line a train step, and one for step 0.

In: the metrics of a step, name to number. Out: a JSON object per line, `step` first, then by name; what is whole stays
an integer. JSON knows neither NaN nor infinity: such a number is written as null (a mean over nothing, a norm that
overflowed), so that any JSON reader can read every line. A line reaches the operating system before `log` returns.
Invariant: steps only rise. Does not own: what the names mean (`docs/metrics.md`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends lines to a new file. Raises FileExistsError where there is one."""

    def __init__(self, run_dir: Path) -> None:
        self._last_step = -1.0
        self._file = (run_dir / FILE_NAME).open("x", encoding="utf-8")

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one line. Raises ValueError for a step that isn't past the last one."""
        step = metrics["step"]
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} came after those of step {self._last_step}")
        names = ["step", *sorted(metrics.keys() - {"step"})]
        self._file.write(json.dumps({name: _number(metrics[name]) for name in names}, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All lines, null as NaN. A last line without its end (the writer died in it) is left out."""
    whole_lines = (run_dir / FILE_NAME).read_text(encoding="utf-8").split("\n")[:-1]
    return [
        {name: math.nan if value is None else value for name, value in json.loads(line).items()} for line in whole_lines
    ]


def _number(value: float) -> float | int | None:
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None
