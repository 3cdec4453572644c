"""How many rollout workers the user asks for: `RUN_DIR/scale`, a number that `asyncdapo scale` writes.

In: a number. Out: the same to the driver of that run, which looks every few seconds, also when it resumes the run on
another machine. Does not own: which numbers are allowed (`rollout.num_workers`), what follows (`fleet/elastic`).
"""

from __future__ import annotations

from pathlib import Path

from asyncdapo.disk import disk_errors, replace_file

FILE_NAME = "scale"


def ask_for(run_dir: Path, num_workers: int) -> None:
    """From now on so many are asked for."""
    path = run_dir / FILE_NAME
    with disk_errors(path):
        replace_file(path, f"{num_workers}\n".encode())


def asked_for(run_dir: Path) -> int | None:
    """None where nobody has asked for a number."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return None
    text = path.read_text().strip()
    return int(text) if text.isdecimal() else None
