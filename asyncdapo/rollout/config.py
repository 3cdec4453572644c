"""Configuration of the rollout workers and their engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncdapo.errors import ConfigError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""What the torch engine computes, as `config.json` of a model names it."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollout workers: how many, with which engine, and how they sample."""

    engine: Literal["torch"] = "torch"
    """Inference engine: `torch` (embedded, CPU or GPU)."""
    num_workers: int = 1
    """Rollout workers, each a process with an engine of its own."""
    slots: int = 64
    """Sequences generated at once by one worker."""
    group_size: int = 16
    """Completions of one prompt: a group."""
    max_response_length: int = 1024
    """Most sampled tokens of a completion; longer ones are cut with finish reason `length`."""
    temperature: float = 1.0
    """Sampling temperature in training; rollout_logprobs are taken at it."""
    on_update: Literal["keep", "recompute"] = "keep"
    """KV cache of running requests at a weight update: keep it (older keys and values) or recompute it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the engine's weights and KV cache, and of the weights sent to it."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu` or `cuda`."""
    threads: int = 1
    """CPU threads of one worker's engine; more than the cores it has to itself makes everything slow."""
    deterministic: bool = False
    """One group at a time in fixed shapes: tokens depend only on weights, prompt and seed. Slow; for tests."""

    def __post_init__(self) -> None:
        for key in ("num_workers", "slots", "group_size", "max_response_length", "threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"rollout.{key}", "must be at least 1", getattr(self, key))
        if not 0 < self.temperature <= 10:
            raise ConfigError(
                "rollout.temperature",
                "must be above 0 and at most 10",
                self.temperature,
                "training needs the log-prob of a sampled token; use 1.0",
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError("rollout.device", "must be auto, cpu or cuda", self.device)
