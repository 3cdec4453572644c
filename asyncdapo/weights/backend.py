"""Choice of the weight group's backend: the user's, else one that fits the devices. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from asyncdapo.errors import ConfigError
from asyncdapo.transport.backend import Backend, fitting_backend, host_of, is_cpu
from asyncdapo.weights.config import WeightsConfig


def choose_backend(config: WeightsConfig, devices: Mapping[str, str]) -> tuple[Backend, str]:
    """Backend for these devices, each end's by its name and the learner's first, and the reason, for the log. Raises
    ConfigError if the config says `nccl` and an end has no GPU of its own."""
    fitting, reason = fitting_backend(devices)
    if config.backend == "nccl" and fitting != "nccl":
        raise ConfigError("weights.backend", f"needs a GPU of its own at every end: {reason}", "nccl", "auto chooses")
    if config.backend != "auto":
        return config.backend, f"weights.backend is {config.backend}"
    return (fitting, reason) if fitting == "nccl" else ("ipc", _where(devices, reason))


def _where(devices: Mapping[str, str], no_nccl: str) -> str:
    """Where memory is shared, and why NCCL isn't used."""
    num_hosts = len({host_of(device) for device in devices.values()})
    if num_hosts > 1:
        return f"shared memory on each of {num_hosts} machines, Gloo between them: {no_nccl}"
    if len(set(devices.values())) == 1 and not any(map(is_cpu, devices.values())):
        return "all ends are on one GPU"
    return f"all ends are on one machine, and {no_nccl}"
