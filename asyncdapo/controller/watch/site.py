"""What the page of `asyncdapo watch --web` asks for: the runs, their charts, processes in time, groups, completions.

In: run directories. Out: records for JSON. It only reads files. What was read is kept for a second, however many pages
ask. Does not own: what is known of a run (`run_state`), the charts (`charts`, `gantt`), the ledger's pages (`pages`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from asyncdapo.api import Run
from asyncdapo.controller.watch.charts import CHARTS, columns, ends
from asyncdapo.controller.watch.gantt import gantt
from asyncdapo.controller.watch.pages import Speller, completion_page, group_page, groups_of
from asyncdapo.controller.watch.run_state import RunState
from asyncdapo.errors import UserError

FRESH_S = 1.0
"""What was read is not read again for so long."""


def tokenizer_of(run_dir: Path) -> Speller:
    """The tokenizer of a run."""
    from asyncdapo.model.tokenizer import load_tokenizer  # takes some seconds

    return load_tokenizer(Run(run_dir).config.model.tokenizer_files)


class Site:
    """What the page asks for. Safe in several threads."""

    def __init__(self, run_dirs: Sequence[Path], tokenizer_of: Callable[[Path], Speller] = tokenizer_of) -> None:
        """Raises UserError if one isn't a run."""
        self._runs = [RunState(run_dir) for run_dir in run_dirs]
        self._lock = threading.Lock()
        self._read_at = -math.inf
        self._tokenizer = cache(tokenizer_of)

    def warm_up(self) -> None:
        """Read the runs and load tokenizers before they are asked for. Who asks for one that can't be loaded hears
        why."""
        self.runs()
        for run in self._runs:
            with suppress(UserError):
                self._tokenizer(run.dir)

    def runs(self) -> list[dict[str, Any]]:
        """Of each run what it does now."""
        with self._lock:
            if time.monotonic() - self._read_at > FRESH_S:
                for run in self._runs:
                    run.update()
                self._read_at = time.monotonic()
            return [_summary(run) for run in self._runs]

    def charts(self, run: int) -> dict[str, Any]:
        """Steps and times, and the columns of every chart."""
        self.runs()
        with self._lock:
            lines = list(self._runs[run].lines)
        return {
            "step": ends([line["step"] for line in lines]),
            "wall_s": ends([line.get("time/wall_s", math.nan) for line in lines]),
            "lines": len(lines),
            "charts": [
                {
                    "title": chart.title,
                    "axis": chart.axis,
                    "look": chart.look,
                    "labels": list(chart.series.values()),
                    "columns": columns(chart, lines),
                }
                for chart in CHARTS
            ],
        }

    def gantt(self, run: int) -> dict[str, Any]:
        return gantt(self._runs[run].dir)

    def groups(self, run: int, step: int) -> list[dict[str, Any]]:
        return groups_of(self._runs[run].dir, step)

    def group(self, run: int, id: int) -> dict[str, Any]:
        run_dir = self._runs[run].dir
        return group_page(run_dir, id, self._tokenizer(run_dir))

    def completion(self, run: int, id: int, sample: int) -> list[dict[str, Any]]:
        run_dir = self._runs[run].dir
        return completion_page(run_dir, id, sample, self._tokenizer(run_dir))


def _summary(run: RunState) -> dict[str, Any]:
    now = time.time()
    return {
        "name": run.name,
        "dir": str(run.dir),
        "state": run.state,
        "step": run.step,
        "total_steps": run.total_steps,
        "lines": len(run.lines),
        "time_left": run.time_left,
        "verdict": run.verdict,
        "alarms": run.alarms,
        "notes": run.notes,
        "processes": [
            {
                "name": f"{row.role} {row.index}",
                "pid": row.pid,
                "host": row.host,
                "state": row.state,
                "behind": "" if row.lag is None else f"{row.lag} {row.lag_unit}",
                "memory_mib": row.memory_mib,
                "groups": work.groups if work else None,
                "tokens": work.tokens if work else None,
                "tokens_per_s": heard.tokens_per_s if heard else None,
                "running": heard.running if heard else None,
                "waiting": heard.waiting if heard else None,
                "heard_ago_s": max(0.0, now - heard.heard_at_s) if heard else None,
            }
            for row in run.rows
            for work, heard in [
                (run.work.get(row.index), run.heard.get(row.index)) if row.role == "rollout" else (None, None)
            ]
        ],
    }
