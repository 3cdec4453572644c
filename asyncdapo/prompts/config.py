"""Configuration of the prompt stream: where prompts come from and in which order."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdapo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from, and how a row becomes tokens."""

    task: str = "chain"
    """Name of the task: `chain` (arithmetic, made on the fly) or `file` (your own JSONL or parquet)."""
    path: str | None = None
    """Data file of the task `file`: .jsonl or .parquet."""
    eval_path: str | None = None
    """Data file of held-out prompts; without one, `eval.num_prompts` rows are held out of `path`."""
    prompt_column: str = "prompt"
    """Column that holds the question."""
    answer_column: str = "answer"
    """Column that holds the expected answer."""
    template: str = "{prompt}"
    """Text given to the model; `{prompt}` is the row's question. Not used with a chat template."""
    chat_template: bool = False
    """Send the question as a user message through the tokenizer's chat template."""
    max_prompt_length: int = 1024
    """Longest prompt in tokens; longer ones are left out and counted."""
    max_attempts: int = 3
    """Leases that may end lost or rejected (expired too, if requeued) before a prompt ends `failed`."""
    epochs: int = 0
    """Passes over the data after which the run ends; 0 is no limit."""

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1:
            raise ConfigError("prompts.max_prompt_length", "must be at least 1 token", self.max_prompt_length)
        if self.max_attempts < 1:
            raise ConfigError("prompts.max_attempts", "must be at least 1", self.max_attempts)
        if self.epochs < 0:
            raise ConfigError("prompts.epochs", "must be 0 (no limit) or more", self.epochs)
        if self.task == "file" and not self.path:
            raise ConfigError("prompts.path", "the task 'file' needs a data file", fix="prompts.path=train.jsonl")
        for key in ("path", "eval_path"):
            if self.task != "file" and getattr(self, key):
                raise ConfigError(
                    f"prompts.{key}", "belongs to the task 'file'", getattr(self, key), "prompts.task=file"
                )
        if "{prompt}" not in self.template:
            raise ConfigError("prompts.template", "must contain {prompt}", self.template)
