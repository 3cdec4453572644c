"""Processes that take turns, as the bench sees them.

In: a command and its spec. Out: the process's report at the end of each turn. Invariant: a process gets one turn at a
time, and has ended when its `with` block ends. Does not own: what a turn is (`turns`, `worker`, `trl_step`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from asyncdapo.errors import RunError

ROOT = str(Path(__file__).resolve().parents[2])
"""Where a worker finds `benchmarks`."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LINES_OF_ERROR = 3
GIVE_UP_S = 10.0


class TurnProcess:
    """One variant in a process of its own."""

    def __init__(self, name: str, command: Sequence[str], spec: dict[str, Any], folder: Path) -> None:
        self.name = name
        file_name = "".join(letter if letter.isalnum() else "_" for letter in name)
        self._errors = folder / f"{file_name}.stderr"
        spec_file = folder / f"{file_name}.json"
        spec_file.write_text(json.dumps(spec))
        variables = {
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            **dict.fromkeys(THREAD_VARIABLES, str(spec["threads"])),
        }
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [*command, str(spec_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **variables},
            )

    def __enter__(self) -> TurnProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        try:
            self._process.wait(GIVE_UP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def heard(self) -> dict[str, Any]:
        """What it says next. Raises RunError, with the last it had to say, when it is gone."""
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = [text.strip() for text in self._errors.read_text().splitlines() if text.strip()]
            raise RunError(f"{self.name}: ended with code {code}: {' · '.join(said[-LINES_OF_ERROR:])}")
        return json.loads(line)

    def turn(self, kind: str) -> dict[str, Any]:
        """One `warm` or timed `step`."""
        try:
            self._process.stdin.write(kind + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone: what it left says why
        return self.heard()
