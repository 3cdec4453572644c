"""Tasks by name. A new one is a module in `tasks/` with a class of the protocol in `task.py`, and a line in TASKS."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from asyncdapo.errors import ConfigError
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.task import Task
from asyncdapo.prompts.tasks.chain import ChainTask
from asyncdapo.prompts.tasks.file import FileTask

TASKS: dict[str, Callable[[PromptsConfig, int, int], Task]] = {
    "chain": lambda config, num_eval, seed: ChainTask(seed),
    "file": lambda config, num_eval, seed: FileTask(config, num_eval),
}


def open_task(config: PromptsConfig, *, num_eval: int, seed: int) -> Task:
    """The task that `prompts.task` names, its data read and checked. Quick, without torch and without a tokenizer.

    `num_eval` is the number of questions that evaluation needs. Raises ConfigError for an unknown name or bad data.
    """
    if config.task not in TASKS:
        nearest = difflib.get_close_matches(config.task, TASKS, n=1, cutoff=0.0)[0]
        known = ", ".join(TASKS)
        raise ConfigError("prompts.task", f"unknown, there are {known}", config.task, f"prompts.task={nearest}")
    task = TASKS[config.task](config, num_eval, seed)
    if config.epochs and task.parts is None:
        raise ConfigError("prompts.epochs", f"the task {config.task!r} has no end", config.epochs, "prompts.epochs=0")
    return task
