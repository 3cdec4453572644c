"""What waits in a run directory for W&B: launches that were offline.

In: RUN_DIR/wandb. Out: the launches that W&B doesn't have, and their upload under the run's id, oldest first, by W&B's
own command, which marks what it has uploaded. Does not own: whether there is a login (`wandb_login`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def waiting_launches(run_dir: Path) -> list[Path]:
    """Folders of offline launches, oldest first. Each has a .wandb file, with a mark beside it once it is uploaded."""
    records = run_dir.glob("wandb/offline-run-*/*.wandb")
    return sorted(record.parent for record in records if not record.with_suffix(".wandb.synced").exists())


def upload(launches: list[Path]) -> None:
    """Upload them, with W&B's own words. What couldn't be uploaded keeps waiting."""
    command = [sys.executable, "-m", "wandb", "sync", *map(str, launches)]
    online = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    subprocess.run(command, env=online, check=False)
