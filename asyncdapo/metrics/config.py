"""Configuration of a run's reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go besides RUN_DIR/metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B: `auto` is online if you are logged in, and offline otherwise."""
    wandb_project: str = "asyncdapo"
    """Name of the W&B project."""
