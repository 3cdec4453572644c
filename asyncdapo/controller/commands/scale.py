"""`asyncdapo scale RUN_DIR N`: how many rollout workers a run should have from now on.

In: a run whose driver lives, and a number within its `rollout.num_workers`. Out: RUN_DIR/scale, which the driver reads
every few seconds, and a line that says what follows. Raises UserError with the fix. Does not own: who joins and leaves
(`fleet/elastic`).
"""

from __future__ import annotations

from pathlib import Path

from asyncdapo.config.config import load_recorded
from asyncdapo.controller.process import roster, wanted_workers
from asyncdapo.errors import ConfigError, UserError
from asyncdapo.replay.ledger.audit import CONFIG_FILE


def command(run_dir: Path, num_workers: int) -> int:
    """Ask for the number."""
    if not (run_dir / CONFIG_FILE).exists():
        raise UserError(f"{run_dir / CONFIG_FILE} is missing: no run was started there (give the run.dir of a launch)")
    rollout = load_recorded(run_dir / CONFIG_FILE)[0].rollout
    least, most = rollout.min_workers, rollout.max_workers
    if not least <= num_workers <= most:
        fix = "launch it again with another range" if least < most else "launch it again with a range, {min: 1, max: 4}"
        raise ConfigError("rollout.num_workers", f"doesn't allow {num_workers} in {run_dir}", rollout.num_workers, fix)
    if not _lives(run_dir):
        raise UserError(f"{run_dir}: its run is over (the same launch resumes it)")
    wanted_workers.ask_for(run_dir, num_workers)
    print(f"{run_dir}: {num_workers} rollout workers are asked for; `asyncdapo ps {run_dir}` shows those there are")
    return 0


def _lives(run_dir: Path) -> bool:
    """Whether its driver does, for all that this machine knows."""
    entries = roster.read(run_dir) if (run_dir / roster.FILE_NAME).exists() else []
    return any(
        entry.role == "controller" and (roster.is_running(entry) or roster.state_of(entry) == roster.OTHER_HOST)
        for entry in entries
    )
