"""Configuration of the prompt stream: where prompts come from and in which order."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from msgspec import Meta

from asyncdapo.errors import ConfigError
from asyncdapo.plugins import is_plugin
from asyncdapo.prompts.mixture import Mixture
from asyncdapo.ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from, and how a row becomes tokens."""

    task: str = "chain"
    """Where questions come from: `chain` and `product` (arithmetic, made on the fly) or `file` (your own JSONL or
    parquet). Or a class of yours: `path/to/file.py:name`, `package.module:name`."""
    path: str | dict[str, float] | None = None
    """Data file of the task `file`, .jsonl or .parquet. Or a mixture of several: `{a.parquet: 3, b.parquet: 1}` draws
    three prompts from the first for each one from the second."""
    eval_path: str | None = None
    """Data file of held-out prompts. Without one, as many rows of `path` are held out as the evaluations need."""
    prompt_column: str = "prompt"
    """Column that holds the question."""
    answer_column: str = "answer"
    """Column that holds the expected answer."""
    template: str = "{prompt}"
    """Text for the model, or the user's message if `chat_template` is on. `{prompt}` is replaced by the row's
    question."""
    chat_template: bool | dict[str, Any] = False
    """Send the text as the user's message, in the tokenizer's chat template. A dict does so with arguments of the
    template's own, such as `{enable_thinking: false}`."""
    system_prompt: str | None = None
    """System message before the user's message. null leaves it to the chat template, which may have one."""
    max_prompt_length: PositiveInt = 1024
    """Longest prompt in tokens. Longer ones are left out and counted."""
    max_attempts: PositiveInt = 3
    """Leases of a prompt that may fail: end as lost, rejected, or requeued after they expired. Then the prompt ends as
    `failed`."""
    retire_above: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """A row whose answers were right more often than this in each of its last two epochs is left out from then on;
    null leaves out none."""
    epochs: NonNegativeInt = 0
    """Passes over the data after which the run ends; 0 is no limit. In a mixture no row is drawn more often than
    this."""

    def __post_init__(self) -> None:
        if self.task == "file" and not self.path:
            raise ConfigError("prompts.path", "the task 'file' needs a data file", fix="prompts.path=train.jsonl")
        for key in ("path", "eval_path"):
            if self.task != "file" and not is_plugin(self.task) and getattr(self, key):
                raise ConfigError(
                    f"prompts.{key}", "belongs to the task 'file'", getattr(self, key), "prompts.task=file"
                )
        if "{prompt}" not in self.template:
            raise ConfigError("prompts.template", "must contain {prompt}", self.template)
        if self.chat_template == {}:
            raise ConfigError("prompts.chat_template", "has no arguments for the template", {}, "use true")
        if self.system_prompt is not None and not self.chat_template:
            problem = "does nothing without prompts.chat_template"
            fix = "set prompts.chat_template, or put the words into prompts.template"
            raise ConfigError("prompts.system_prompt", problem, self.system_prompt, fix)
        if self.system_prompt is not None and not self.system_prompt.strip():
            fix = "null leaves it to the chat template"
            raise ConfigError("prompts.system_prompt", "is empty", self.system_prompt, fix)
        if isinstance(self.path, dict):
            self._check_mixture(self.path)

    def _check_mixture(self, mixture: dict[str, float]) -> None:
        places: dict[str, str] = {}
        for path, weight in mixture.items():
            if not math.isfinite(weight) or weight <= 0:
                problem = f"the weight of {path} must be a number above 0"
                raise ConfigError("prompts.path", problem, weight, "leave the file out, or give it a weight")
            same = places.setdefault(os.path.abspath(path), path)
            if same != path:
                raise ConfigError("prompts.path", "names one file twice", [same, path], "add up the two weights")
        Mixture(list(self.weights.values()), seed=0)  # refuses weights that would make too long a block

    @property
    def template_arguments(self) -> dict[str, Any]:
        """For the chat template."""
        return self.chat_template if isinstance(self.chat_template, dict) else {}

    @property
    def weights(self) -> dict[str, Fraction]:
        """Weight of each training file, as it is written in decimal; a single file's is 1. Empty without files."""
        files = {self.path: 1.0} if isinstance(self.path, str) else self.path or {}
        return {path: Fraction(repr(float(weight))) for path, weight in files.items()}
