"""What `asyncdapo eval` evaluates: the model that CHECKPOINT names, and the run that it comes from.

    RUN_DIR                        the newest checkpoint of which every byte is as it was written
    RUN_DIR/checkpoints/step-36    this one
    a directory                    a model in Hugging Face format
    ORG/NAME                       a model on the hub, or in its cache here

In: what the user typed. Out: a `Subject`. Raises UserError when there is no such model, or a damaged one. Reads only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from asyncdapo.config.config import load_recorded
from asyncdapo.controller.checks.identity import unknown_keys
from asyncdapo.errors import UserError
from asyncdapo.learner.storage.checkpoint import check_checkpoint, checkpoint_dir, kept_steps
from asyncdapo.model.location import check_model_path, is_path
from asyncdapo.replay.ledger.audit import CONFIG_FILE

KEY = "CHECKPOINT"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model."""

    model: str
    """Absolute directory, or id on the hub."""
    name: str
    """For titles."""
    folder: Path
    """Where its answers go, below `evals`: of a run by its directory, so that no two share one."""
    config: Path | None = None
    """Configuration of the run that it comes from."""
    step: int = 0
    """Train step after which it was written: the version of its weights."""
    problems: tuple[str, ...] = ()
    """Newer checkpoints and recorded keys that can't be used, and why."""


def find_subject(checkpoint: str) -> Subject:
    """Resolve what the user typed."""
    path = Path(checkpoint).expanduser().absolute()
    if (path / CONFIG_FILE).is_file():
        return _newest(path)
    run_dir = path.parent.parent
    if path.is_dir() and path.parent.name == "checkpoints" and (run_dir / CONFIG_FILE).is_file():
        if problems := check_checkpoint(path):
            raise UserError(f"{checkpoint}: is damaged: {'; '.join(problems)} (another one of {path.parent})")
        return _of_run(run_dir, path)
    if path.is_file():
        raise UserError(f"{checkpoint}: is a file (give the directory that holds config.json and the weights)")
    if not path.exists() and (is_path(checkpoint) or checkpoint.startswith("runs/")):
        raise UserError(f"{checkpoint}: no such run, checkpoint or model directory")
    model = check_model_path(checkpoint, [Path.cwd()], KEY)
    name = _file_name(Path(model).name)
    return Subject(model=model, name=name, folder=Path(name))


def _newest(run_dir: Path) -> Subject:
    problems: list[str] = []
    for step in reversed(kept_steps(run_dir)):
        path = checkpoint_dir(run_dir, step)
        if not (wrong := check_checkpoint(path)):
            return _of_run(run_dir, path, problems)
        problems.append(f"{path.name}: {'; '.join(wrong)}")
    unused = f": {' · '.join(problems)}" if problems else ""
    raise UserError(f"{run_dir / 'checkpoints'}: holds no checkpoint that can be used{unused}")


def _of_run(run_dir: Path, path: Path, problems: list[str] | None = None) -> Subject:
    config = run_dir / CONFIG_FILE
    recorded, gone = load_recorded(config)
    return Subject(
        model=str(path),
        name=f"{_file_name(recorded.run.name)}-{path.name}",
        folder=_below_here(run_dir) / path.name,
        config=config,
        step=int(path.name.removeprefix("step-")),
        problems=(*(problems or ()), *unknown_keys(config, gone)),
    )


def _below_here(directory: Path) -> Path:
    """Relative to the working directory, or to the root where it isn't below that."""
    here = Path.cwd()
    return directory.relative_to(here if directory.is_relative_to(here) else directory.anchor)


def _file_name(name: str) -> str:
    """Without what a file's name may not hold."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"
