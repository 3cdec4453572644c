"""Choice of the process group's backend, from where the two ends keep their weights. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from asyncdapo.errors import ConfigError
from asyncdapo.weights.config import WeightsConfig

Backend = Literal["gloo", "nccl"]

CPU = "cpu"


def choose_backend(config: WeightsConfig, devices: Mapping[str, str]) -> tuple[Backend, str]:
    """Backend for these ends, and why, for the log.

    `devices` maps each end (`learner`, `rollout 0`, …) to `cpu` or to a name of its GPU that no other GPU has
    (`group.device_name`). NCCL wants a GPU at every end, and one of its own, unless the user names it outright.
    Raises ConfigError when `nccl` is demanded and an end has no GPU.
    """
    without_gpu = [end for end, device in devices.items() if device == CPU]
    shared = [device for device, count in Counter(devices.values()).items() if count > 1 and device != CPU]
    if config.backend == "gloo":
        return "gloo", "weights.backend is gloo"
    if config.backend == "nccl":
        if without_gpu:
            raise ConfigError(
                "weights.backend", f"needs a GPU at every end, {without_gpu[0]} has none", "nccl", "auto chooses"
            )
        return "nccl", "weights.backend is nccl"
    if without_gpu:
        return "gloo", f"{without_gpu[0]} has no GPU"
    if shared:
        ends = " and ".join(end for end, device in devices.items() if device == shared[0])
        return "gloo", f"{ends} share a GPU, and NCCL wants one for each"
    return "nccl", "every end has a GPU of its own"
