"""Tasks by name."""

import subprocess
import sys

import pytest

from asyncdapo.errors import ConfigError
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.registry import open_task


def test_a_task_is_opened_by_its_name():
    assert open_task(PromptsConfig(task="chain"), num_eval=8, seed=0).question_at(0).source == "chain"


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"prompts.task: unknown, there are chain, file, product, got 'chian' \(prompts.task=ch"
    ):
        open_task(PromptsConfig(task="chian"), num_eval=8, seed=0)


def test_epochs_of_an_endless_task_are_refused():
    with pytest.raises(ConfigError, match="prompts.epochs: the task 'chain' has no end, got 2"):
        open_task(PromptsConfig(task="chain", epochs=2), num_eval=8, seed=0)


def test_rows_of_an_endless_task_cannot_be_retired():
    with pytest.raises(ConfigError, match="prompts.retire_above: the task 'chain' is endless, no row comes twice"):
        open_task(PromptsConfig(task="chain", retire_above=0.9), num_eval=8, seed=0)


def test_tasks_are_opened_without_torch_ray_or_transformers():
    code = "import sys, asyncdapo.prompts.registry; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
