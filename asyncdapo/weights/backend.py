"""Choice of the weight group's backend: the user's, else one that fits the devices. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from asyncdapo.errors import ConfigError
from asyncdapo.transport.backend import Backend, fitting_backend, host_of, is_cpu
from asyncdapo.weights.config import WeightsConfig

HOST_ID = "NCCL_HOSTID"
"""NCCL treats processes with different values of this variable as on different hosts, and lets them share a GPU."""


def choose_backend(config: WeightsConfig, devices: Mapping[str, str]) -> tuple[Backend, str]:
    """Backend for these devices, each end's by its name and the learner's first, and the reason, for the log. Raises
    ConfigError if the config says `nccl` and an end has no GPU of its own, or `ipc` and one is on another machine."""
    if config.backend == "auto":
        return _fitting(devices)
    _refuse_impossible(config.backend, devices)
    return config.backend, f"weights.backend is {config.backend}"


def _fitting(devices: Mapping[str, str]) -> tuple[Backend, str]:
    """As `fitting_backend`, but ends on one machine that can't use NCCL use shared memory instead of the network."""
    backend, reason = fitting_backend(devices)
    if backend == "nccl" or len({host_of(device) for device in devices.values()}) > 1:
        return backend, reason
    if len(set(devices.values())) == 1 and not any(map(is_cpu, devices.values())):
        return "ipc", "all ends are on one GPU"
    return "ipc", f"all ends are on one machine, and {reason}"


def _refuse_impossible(backend: Backend, devices: Mapping[str, str]) -> None:
    without_gpu = [end for end, device in devices.items() if is_cpu(device)]
    if backend == "nccl" and without_gpu:
        raise ConfigError(
            "weights.backend", f"needs a GPU at every end, {without_gpu[0]} has none", "nccl", "auto chooses"
        )
    if backend == "nccl" and len(set(devices.values())) < len(devices) and HOST_ID not in os.environ:
        problem = f"needs a GPU of its own at every end: {fitting_backend(devices)[1]}"
        raise ConfigError("weights.backend", problem, "nccl", "auto chooses")
    (first, here), *others = ((end, host_of(device)) for end, device in devices.items())
    elsewhere = [(end, host) for end, host in others if host != here]
    if backend == "ipc" and elsewhere:
        end, host = elsewhere[0]
        problem = f"needs all ends on one machine, {first} is on {here} and {end} on {host}"
        raise ConfigError("weights.backend", problem, "ipc", "auto chooses")
