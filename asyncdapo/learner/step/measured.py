"""Measured: how fast a train step was and how much memory a rank has taken, to be held against the formulas.

In: what the forward and backward passes of a step were about, and the seconds of the step. Out: metrics. Operations are
those of `shape.train_flops`: no recomputation, no padding, a shared prompt once; passes without gradient are left out,
so a loss that needs them shows a lower MFU. Made before the model is loaded, whose memory is to be seen. Does not own:
the formulas (`shape`), what is counted (`packing.Work`).
"""

from __future__ import annotations

import resource
import sys

import torch

from asyncdapo.learner.model.packing import Work
from asyncdapo.model.shape import Shape, peak_flops

GIB = 1 << 30
RESIDENT_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes, of what the system counts in."""


class Measured:
    """Of one rank on this device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resident_before = _peak_resident_bytes()
        self._peak_flops = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def metrics(self, shape: Shape | None, work: Work, seconds: float, num_ranks: int = 1) -> dict[str, float]:
        """`work` of all ranks in these seconds. What isn't known, for the kind of model or the GPU, is left out."""
        metrics = {"learner/peak_gib": self.peak_bytes() / GIB}
        if shape is not None:
            flops = shape.train_flops(work.num_computed_tokens, work.num_loss_tokens, work.num_pairs) / seconds
            metrics["learner/tflops"] = flops / 1e12
            if self._peak_flops:
                metrics["learner/mfu"] = flops / num_ranks / self._peak_flops
        return metrics

    def peak_bytes(self) -> int:
        """On a GPU the most that tensors have taken so far; elsewhere how far the peak of the process's resident memory
        has risen, which has code and what the allocator keeps in it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_resident_bytes() - self._resident_before


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RESIDENT_UNIT
