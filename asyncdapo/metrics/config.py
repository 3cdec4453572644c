"""Configuration of a run's reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncdapo.ranges import NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go besides RUN_DIR/metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B: `auto` is online if you are logged in, and offline otherwise."""
    wandb_project: str = "asyncdapo"
    """Name of the W&B project."""
    samples_every: NonNegativeInt = 0
    """Train steps from one table of samples at W&B to the next: up to 8 completions of the step's batch, prompts and
    texts included. 0 is none."""
    keep_samples: NonNegativeInt = 2
    """Groups of each batch whose tokens stay in RUN_DIR/samples when replay frees its payloads, for the page of
    `asyncdapo watch --web`. A token takes 8 bytes. 0 is none."""
