"""The configuration of an evaluation: that of a run, with what only training needs taken out.

    --config, else that of the checkpoint's run, else the defaults
        ◀─ key=value, --samples
        ◀─ --data: every row of it, unless eval.num_prompts says how many; else the run's own held-out prompts
        ◀─ the checkpoint is the model, --out the directory

In: what the user typed, and the model. Out: an effective `Config` (absolute paths) for processes that generate and
judge. Raises UserError. Invariant: prompts that the run held out of its training data are the same here, so none that
it was trained on is ever asked. Does not own: which model (`subject`), running it (`alone`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from asyncdapo.config.config import Config, load_config, load_recorded
from asyncdapo.config.found import find_config
from asyncdapo.controller.checks.engine_check import check_model
from asyncdapo.controller.checks.preflight import check_config, effective
from asyncdapo.controller.eval.subject import Subject
from asyncdapo.errors import ConfigError, UserError
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.registry import open_task
from asyncdapo.replay.config import FilterConfig

PREPARED = "manifest.json"
"""Beside the files that `asyncdapo data prepare` writes."""
PREPARED_FILES = ("test.parquet", "train.parquet")
"""The first that is there is evaluated on."""
REQUEST_SIZE = 4
"""Completions that a worker is asked for at once, `rollout.group_size` of a run. It answers when the longest is done:
with fewer of them its slots are free earlier, and less is lost when the command is interrupted."""
GIVEN_ELSEWHERE = {
    "model.path": "CHECKPOINT",
    "run.dir": "--out",
    "prompts.eval_path": "--data",
    "eval.num_samples": "--samples",
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user typed, CHECKPOINT aside."""

    data: Path | None = None
    samples: int | None = None
    config: str | None = None
    out: Path | None = None
    overrides: Sequence[str] = ()

    @property
    def changed(self) -> set[str]:
        """Keys that the overrides name."""
        return {override.partition("=")[0] for override in self.overrides}


def make_config(subject: Subject, wanted: Wanted) -> Config:
    """Read, merge, check."""
    for key in sorted(wanted.changed & set(GIVEN_ELSEWHERE)):
        other = GIVEN_ELSEWHERE[key]
        if key != "eval.num_samples" or wanted.samples is not None:
            raise ConfigError(key, f"is what {other} says", fix=f"use {other} instead")
    file = find_config(wanted.config) if wanted.config else subject.config
    if file is None and wanted.data is None:
        fix = "--data FILE, or --config CONFIG"
        raise UserError(f"{subject.model}: does not come from a run, so it has no held-out prompts of its own ({fix})")
    config = _load(file, subject, wanted)
    config = replace(config, prompts=_prompts(config, file, subject, wanted))
    config = _without_training(config, file, subject, wanted)
    config = effective(config, file.parent if file else Path.cwd())
    if wanted.data and "eval.num_prompts" not in wanted.changed:
        num_rows = open_task(config.prompts, num_eval=0, seed=config.run.seed).num_eval_rows
        assert num_rows is not None, "a file has an end"
        num_greedy = min(num_rows, config.eval.num_greedy_prompts)
        config = replace(config, eval=replace(config.eval, num_prompts=num_rows, num_greedy_prompts=num_greedy))
    if not config.eval.num_held_out:
        raise ConfigError("eval.num_prompts", "leaves nothing to evaluate", 0, "eval.num_prompts=100")
    check_config(config)
    check_model(config)
    return config


def _load(file: Path | None, subject: Subject, wanted: Wanted) -> Config:
    """The file's values, or the defaults, under the overrides. Defaults say nothing about greedy decoding."""
    given = [f"model.path={json.dumps(subject.model)}", *([] if file else ["eval.num_greedy_prompts=0"])]
    samples = [] if wanted.samples is None else [f"eval.num_samples={wanted.samples}"]
    changes = [*given, *wanted.overrides, *samples]
    if file and wanted.config is None:
        return load_recorded(file, changes)[0]
    return load_config(file or Path(os.devnull), changes)


def _prompts(config: Config, file: Path | None, subject: Subject, wanted: Wanted) -> PromptsConfig:
    """Those to evaluate on; training data that they weren't held out of is left alone."""
    prompts = replace(config.prompts, epochs=0)
    if wanted.data is None:
        if prompts.eval_path:
            return replace(prompts, path=prompts.eval_path)
        assert file is not None, "without one `--data` is required"
        _check_held_out(config, file, subject)
        return prompts
    data = _data_file(wanted.data)
    if (data.parent / PREPARED).is_file():
        columns = {"prompts.prompt_column": "prompt", "prompts.answer_column": "answer"}
        names = {key.removeprefix("prompts."): name for key, name in columns.items() if key not in wanted.changed}
        prompts = replace(prompts, **names)
    return replace(prompts, task="file", path=str(data), eval_path=str(data))


def _check_held_out(config: Config, file: Path, subject: Subject) -> None:
    """Which rows of a training file are held out depends on how many."""
    known = _load(file, subject, Wanted())
    if config.prompts.task == "file" and config.eval.num_held_out != known.eval.num_held_out:
        problem = f"{known.eval.num_held_out} rows are held out of prompts.path, and other numbers hold out other rows"
        fix = "leave both as they are, or give --data"
        raise ConfigError("eval.num_prompts, eval.num_greedy_prompts", problem, config.eval.num_held_out, fix)


def _data_file(data: Path) -> Path:
    """The file itself, or the one of a directory that `data prepare` wrote."""
    if not data.is_dir():
        return data.absolute()
    found = next((data / name for name in PREPARED_FILES if (data / name).is_file()), None)
    if found is None:
        raise UserError(f"--data: {data} has neither {' nor '.join(PREPARED_FILES)} (give a .parquet or .jsonl file)")
    return found.absolute()


def _without_training(config: Config, file: Path | None, subject: Subject, wanted: Wanted) -> Config:
    """No learner, no filter, no reference model, no upload. A checkpoint of a run brings its tokenizer."""
    own = file == subject.config and "model.tokenizer" not in wanted.changed
    shared = config.controller.placement == "shared"
    group_size = config.rollout.group_size
    if "rollout.group_size" not in wanted.changed:
        group_size = min(group_size, REQUEST_SIZE)
    return replace(
        config,
        run=replace(config.run, name=subject.name, dir=str(wanted.out or _default_out(subject, wanted.data))),
        model=replace(config.model, reference=None, tokenizer=None if own else config.model.tokenizer),
        rollout=replace(config.rollout, group_size=group_size),
        filter=FilterConfig(enabled=False),
        replay=replace(config.replay, max_staleness=config.replay.staleness_bound),
        controller=replace(config.controller, placement="auto" if shared else config.controller.placement),
        metrics=MetricsConfig(wandb="disabled"),
    )


def _default_out(subject: Subject, data: Path | None) -> Path:
    """Answers to other data are other answers."""
    folder = subject.folder
    return Path("evals") / (folder.with_name(f"{folder.name}-{data.stem}") if data else folder)
