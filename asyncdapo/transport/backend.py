"""Choice of a process group's backend, from the devices of its ranks. Imports no torch.

A device is sent by its name: `cpu on node-1`, or `cuda 1f… on node-1` with the GPU's own id. Equal names mean the same
device in every process (`shared_memory.device_name`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

Backend = Literal["gloo", "nccl", "ipc"]

CPU = "cpu"
ON = " on "
HOST_ID = "NCCL_HOSTID"
"""NCCL treats processes with different values of this variable as on different hosts, and lets them share a GPU."""


def name_device(device: str, host: str) -> str:
    """The name of a device (`cpu`, or `cuda` and the GPU's id) of this host."""
    return f"{device}{ON}{host}"


def is_cpu(device: str) -> bool:
    """Whether this device is a CPU."""
    return device.partition(ON)[0] == CPU


def host_of(device: str) -> str:
    """The host on which the device is."""
    return device.partition(ON)[2]


def fitting_backend(devices: Mapping[str, str]) -> tuple[Backend, str]:
    """Backend for sums or broadcasts over a network, and the reason, for the log: NCCL if every rank has a GPU of its
    own. `devices` maps each rank's name (`learner`, `rollout-0`, …) to the name of its device."""
    without_gpu = [end for end, device in devices.items() if is_cpu(device)]
    if without_gpu:
        return "gloo", f"{without_gpu[0]} has no GPU"
    shared = [device for device, count in Counter(devices.values()).items() if count > 1]
    if shared:
        ends = " and ".join(end for end, device in devices.items() if device == shared[0])
        return "gloo", f"{ends} share a GPU, and NCCL wants one for each"
    return "nccl", "every end has a GPU of its own"
