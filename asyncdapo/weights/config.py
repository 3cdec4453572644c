"""Configuration of the weight broadcast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncdapo.ranges import PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The broadcast of new weights from the learner to the rollout workers."""

    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """How weights travel: `nccl` between GPUs; `ipc` through shared memory within a machine, or a GPU, and by Gloo from
    machine to machine; `gloo` by Gloo to every worker. `auto` takes `nccl` or `ipc`, and the run says why."""
    bucket_mb: PositiveInt = 16
    """Largest piece of a broadcast in MiB. The learner holds two: it fills one while it sends the other. Where shards
    are on GPUs or on several machines, rank 0 holds a third at most, and each other rank its part of one."""
    timeout_s: PositiveFloat = 60.0
    """Seconds after which a transfer has failed. Workers then keep the weights that they have. The learner's ranks have
    the same time to find each other."""
    max_missed: PositiveInt = 3
    """Transfers of one version that may fail before the run ends."""
