"""Choice of a process group's backend, from where its ends keep their tensors. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

Backend = Literal["gloo", "nccl"]

CPU = "cpu"


def fitting_backend(devices: Mapping[str, str]) -> tuple[Backend, str]:
    """Backend for these ends, and why, for the log: NCCL where every end has a GPU of its own.

    `devices` maps each end (`learner`, `rollout-0`, …) to `cpu` or to a name of its GPU that no other GPU has
    (`process_group.device_name`).
    """
    without_gpu = [end for end, device in devices.items() if device == CPU]
    if without_gpu:
        return "gloo", f"{without_gpu[0]} has no GPU"
    shared = [device for device, count in Counter(devices.values()).items() if count > 1]
    if shared:
        ends = " and ".join(end for end, device in devices.items() if device == shared[0])
        return "gloo", f"{ends} share a GPU, and NCCL wants one for each"
    return "nccl", "every end has a GPU of its own"
