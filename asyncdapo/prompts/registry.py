"""Opens the task that `prompts.task` names: one of TASKS, or a class of the user's (`plugins.py`).

A built-in task is a module in `tasks/`, whose class implements the protocol of `task.py`, and a line in TASKS. A user's
class is called with (config, num_eval, seed) and returns a Task.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from asyncdapo.errors import ConfigError
from asyncdapo.plugins import broken, check_call, is_plugin, load_plugin
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.task import Question, Task
from asyncdapo.prompts.tasks.chain import ChainTask
from asyncdapo.prompts.tasks.file import FileTask
from asyncdapo.prompts.tasks.product import ProductTask

TASKS: dict[str, Callable[[PromptsConfig, int, int], Task]] = {
    "chain": lambda config, num_eval, seed: ChainTask(seed),
    "file": lambda config, num_eval, seed: FileTask(config, num_eval),
    "product": lambda config, num_eval, seed: ProductTask(),
}


def open_task(config: PromptsConfig, *, num_eval: int, seed: int) -> Task:
    """The task that `prompts.task` names, with its data read and checked. Fast: needs no torch and no tokenizer.

    `num_eval` is the number of questions that evaluation needs. Raises ConfigError for an unknown name or bad data.
    """
    own = is_plugin(config.task)
    if not own and config.task not in TASKS:
        nearest = difflib.get_close_matches(config.task, TASKS, n=1, cutoff=0.0)[0]
        known = ", ".join(TASKS)
        raise ConfigError("prompts.task", f"unknown, there are {known}", config.task, f"prompts.task={nearest}")
    task = (_open_own if own else TASKS[config.task])(config, num_eval, seed)
    if config.epochs and task.parts is None:
        raise ConfigError("prompts.epochs", f"the task {config.task!r} has no end", config.epochs, "prompts.epochs=0")
    if config.retire_above is not None and task.parts is None:
        problem = f"the task {config.task!r} is endless, no row comes twice"
        raise ConfigError("prompts.retire_above", problem, config.retire_above, "prompts.retire_above=null")
    return task


def _open_own(config: PromptsConfig, num_eval: int, seed: int) -> Task:
    """A user's task, after a trial of its first two rows. Raises ConfigError."""
    key, name = "prompts.task", config.task
    make = load_plugin(key, name)
    check_call(key, name, make, "(config, num_eval, seed)", config, num_eval, seed)
    try:
        task = make(config, num_eval, seed)
        first = [0, 1] if task.parts is None else [row for part in task.parts for row in part.rows[:2]][:2]
        asked = [task.question_at(row) for row in first] + [task.eval_question_at(0) for _ in range(min(1, num_eval))]
        again = [task.question_at(row) for row in first]
        num_eval_rows = task.num_eval_rows
    except Exception as error:  # noqa: BLE001 (the user's class may raise anything)
        raise broken(key, name, error, "raised on a trial of two rows") from error
    for question in asked:
        texts = (question.text, question.answer, question.source) if isinstance(question, Question) else (question,)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(key, f"must return Questions whose texts are str, returned {question!r}", name)
    if asked[: len(first)] != again:
        raise ConfigError(key, "returned two different questions for one row", name, "derive it from the row alone")
    if num_eval_rows is not None and num_eval_rows < num_eval:
        raise ConfigError(key, f"has {num_eval_rows} held-out questions, evaluation needs {num_eval}", name)
    return task
