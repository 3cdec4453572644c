"""Configuration of a run's reports."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from asyncdapo.errors import ConfigError
from asyncdapo.ranges import NonNegativeInt

SinkName = Literal["wandb", "tensorboard", "trackio", "prometheus"]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go besides RUN_DIR/metrics.jsonl."""

    sinks: tuple[SinkName, ...] = ("wandb",)
    """Who gets the metrics, several at a time; each but `wandb` needs the extra of its name. `[]` is nobody."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B: `auto` is online if you are logged in, and offline otherwise. `disabled` takes it out of `metrics.sinks`."""
    wandb_project: str = "asyncdapo"
    """Name of the project at W&B and Trackio."""
    prometheus_address: str = "127.0.0.1:9464"
    """Host and port at which Prometheus reads the newest metrics. Port 0 is any free one; host 0.0.0.0 lets other
    machines read them, whoever they are."""
    samples_every: NonNegativeInt = 0
    """Train steps from one table of samples at W&B, Trackio and TensorBoard to the next: up to 8 completions of the
    step's batch, prompts and texts included. 0 is none."""
    keep_samples: NonNegativeInt = 2
    """Groups of each batch whose tokens stay in RUN_DIR/samples when replay frees its payloads, for the page of
    `asyncdapo watch --web`, with the learner's log-probs of them. A token takes 12 bytes. 0 is none."""

    def __post_init__(self) -> None:
        port = re.fullmatch(r"[\w.-]+:(\d+)", self.prometheus_address)
        if not port or int(port[1]) > 65535:
            problem, fix = "must be host:port", "127.0.0.1:9464"
            raise ConfigError("metrics.prometheus_address", problem, self.prometheus_address, fix)
