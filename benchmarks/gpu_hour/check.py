"""What every check of the GPU hour is: a process that writes its figures to a file as soon as it has them.

    python -m benchmarks.gpu_hour.NAME --figures FILE [--cpu] …

A check ends with code 0 when what it holds is so, with another one when it isn't. Figures that were written before are
kept, also where the process is killed in the middle. `summary` among them is the line of the table.
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
        """Keep these, whatever comes after."""
        self.found |= found
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self.found))
        os.replace(beside, self._path)


def hold(condition: bool, otherwise: str) -> None:
    """End the check with these words unless the condition is so."""
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
