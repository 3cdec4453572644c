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

from asyncdapo.config import load_config
from asyncdapo.errors import UserError
from asyncdapo.learner.checkpoint import STEP_NAME, check_checkpoint, checkpoint_dir, kept_steps
from asyncdapo.learner.model_path import check_model_path, is_path
from asyncdapo.replay.audit import CONFIG_FILE

KEY = "CHECKPOINT"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model."""

    model: str
    """Absolute directory, or id on the hub."""
    name: str
    """For directories and titles."""
    config: Path | None = None
    """Configuration of the run that it comes from."""
    step: int = 0
    """Train step after which it was written: the version of its weights."""
    problems: tuple[str, ...] = ()
    """Newer checkpoints that can't be used, and why."""


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
    return Subject(model=model, name=_file_name(Path(model).name))


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
    return Subject(
        model=str(path),
        name=f"{_file_name(load_config(config).run.name)}-{path.name}",
        config=config,
        step=int(STEP_NAME.fullmatch(path.name)[1]),
        problems=tuple(problems or ()),
    )


def _file_name(name: str) -> str:
    """Without what a file's name may not hold."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"
