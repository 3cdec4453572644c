"""Choice of the weight group's backend: what the user names, else what fits the ends. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from asyncdapo.errors import ConfigError
from asyncdapo.transport.backend import CPU, Backend, fitting_backend
from asyncdapo.weights.config import WeightsConfig


def choose_backend(config: WeightsConfig, devices: Mapping[str, str]) -> tuple[Backend, str]:
    """Backend for these ends (`fitting_backend`), and why, for the log. Raises ConfigError when `nccl` is demanded and
    an end has no GPU."""
    if config.backend == "auto":
        return fitting_backend(devices)
    without_gpu = [end for end, device in devices.items() if device == CPU]
    if config.backend == "nccl" and without_gpu:
        raise ConfigError(
            "weights.backend", f"needs a GPU at every end, {without_gpu[0]} has none", "nccl", "auto chooses"
        )
    return config.backend, f"weights.backend is {config.backend}"
