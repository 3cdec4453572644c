"""A check of the GPU hour: a process that writes its figures to a file as soon as it has them.

    python -m benchmarks.gpu_hour.NAME --figures FILE [--cpu] …

A check ends with code 0 if what it checks is true, otherwise with another code. Figures written before are kept, also
if the process is killed in the middle. The figure `summary` is the line of the table.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Figures:
    """What a check has found so far."""

    def __init__(self, path: Path) -> None:
        self._path, self.found = path, {}

    def add(self, **found: Any) -> None:
        """Write these figures to the file at once."""
        self.found |= found
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self.found))
        os.replace(beside, self._path)


def hold(condition: bool, otherwise: str) -> None:
    """End the check with this message unless the condition is true."""
    if not condition:
        raise SystemExit(otherwise)


def main(measure: Callable[[Figures, argparse.Namespace], None], *options: str) -> None:
    """Run one check. `options` are further flags that take a word."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="a small stand-in without a GPU")
    for option in options:
        parser.add_argument(option)
    args = parser.parse_args()
    measure(Figures(args.figures), args)
