"""The sinks that `metrics.sinks` names: what they need, and how they are opened.

In: the section `metrics`. Out: sinks, each in a thread of its own. `check_sinks` comes before a run: whatever the user
can fix is told there. Does not own: what a sink does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from asyncdapo.errors import ConfigError
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.sinks.prometheus_sink import PrometheusSink
from asyncdapo.metrics.sinks.sink import BackgroundSink, Sink
from asyncdapo.metrics.sinks.tensorboard_sink import TensorBoardSink
from asyncdapo.metrics.sinks.trackio_sink import TrackioSink
from asyncdapo.metrics.sinks.wandb_login import choose_mode
from asyncdapo.metrics.sinks.wandb_sink import WandbSink, run_id

MODULES = {"tensorboard": "tensorboard", "trackio": "trackio", "prometheus": "prometheus_client"}
"""What is imported for a sink that has an extra of its name."""


def check_sinks(config: MetricsConfig) -> None:
    """Raises ConfigError for a sink whose package or login is missing."""
    for name in config.sinks:
        if name in MODULES and find_spec(MODULES[name]) is None:
            raise ConfigError("metrics.sinks", f"{name} isn't installed", fix=f"pip install 'asyncdapo[{name}]'")
    choose_mode(config)


def open_sinks(run_dir: Path, config: MetricsConfig, name: str, settings: Mapping[str, Any]) -> list[BackgroundSink]:
    """In the order of `metrics.sinks`. `name`: of the run; `settings`: its configuration, for sinks that show it."""
    mode = choose_mode(config)
    openers: dict[str, Callable[[], Sink]] = {
        "wandb": partial(WandbSink, run_dir, config, mode, name, settings),
        "tensorboard": partial(TensorBoardSink, run_dir),
        "trackio": lambda: TrackioSink(config.wandb_project, f"{name}-{run_id(run_dir)}", settings),
        "prometheus": partial(PrometheusSink, config.prometheus_address, name),
    }
    names = [name for name in dict.fromkeys(config.sinks) if not (name == "wandb" and mode == "disabled")]
    return [BackgroundSink(name, openers[name]) for name in names]
