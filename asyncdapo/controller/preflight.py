"""Everything that can be wrong with a run and is the user's to mend, found before any process starts.

In: the config's name and the overrides. Out: the effective `Config`, written to RUN_DIR/config.yaml: paths absolute and
`max_staleness` the bound in force. Raises UserError (exit code 2), and then nothing was created.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from asyncdapo.config import Config, find_config, load_config, to_yaml
from asyncdapo.errors import ConfigError
from asyncdapo.learner.model_path import check_model_path
from asyncdapo.metrics.wandb_log import choose_mode
from asyncdapo.prompts.registry import open_task
from asyncdapo.replay.audit import CONFIG_FILE
from asyncdapo.reward.registry import make_verifier
from asyncdapo.reward.scorer import METRICS


def prepare_run(name_or_path: str, overrides: Sequence[str]) -> Config:
    """Read and check the configuration, the model path, the data; then make the run directory."""
    path = find_config(name_or_path)
    config = effective(load_config(path, overrides), path.parent)
    make_verifier(config.reward.verifier)
    if config.filter.enabled and config.filter.metric not in METRICS:
        raise ConfigError("filter.metric", "is no metric of the scorer", config.filter.metric, ", ".join(METRICS))
    choose_mode(config.metrics)
    open_task(config.prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
    make_run_dir(config)
    return config


def make_run_dir(config: Config) -> None:
    """An empty directory that is this run's alone; config.yaml in it is the sign that it is taken."""
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(run_dir.iterdir()):
            raise ConfigError("run.dir", "is in use", config.run.dir, "choose another, or remove the directory")
        with (run_dir / CONFIG_FILE).open("x", encoding="utf-8") as file:
            file.write(to_yaml(config))
    except OSError as error:
        raise ConfigError("run.dir", f"can't be used ({error.strerror})", config.run.dir) from error


def effective(config: Config, config_dir: Path) -> Config:
    """The configuration with absolute paths and the staleness bound that is in force."""
    replace = dataclasses.replace
    bound = config.replay.staleness_bound
    if bound != config.replay.max_staleness:
        print(f"replay.run_ahead is 0: training is synchronous, replay.max_staleness is {bound} in force")
    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir).absolute())),
        model=replace(config.model, path=check_model_path(config.model.path, [Path.cwd(), config_dir])),
        prompts=replace(
            config.prompts, path=_absolute(config.prompts.path), eval_path=_absolute(config.prompts.eval_path)
        ),
        replay=replace(config.replay, max_staleness=bound),
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
