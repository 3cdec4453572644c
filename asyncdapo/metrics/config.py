"""Configuration of a run's reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where the metrics go besides RUN_DIR/metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B: `auto` is online when logged in and offline otherwise."""
    wandb_project: str = "asyncdapo"
    """W&B project."""
