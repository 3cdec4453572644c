"""The rate of matrix products: what this machine, with these threads or this GPU, makes of the best work there is.

MFU is measured against it on a CPU, where no data sheet knows the clock rate or who else is there, and beside the data
sheet on a GPU.
"""

from __future__ import annotations

import time

import torch

SIZES = {"cpu": 1024, "cuda": 8192}
SECONDS = 0.3


class Products:
    """Square matrices of one dtype."""

    def __init__(self, device: str, dtype: str) -> None:
        self._size = SIZES[device]
        self._left, self._right = torch.randn(2, self._size, self._size, device=device, dtype=getattr(torch, dtype))

    def flops_per_s(self) -> float:
        """Measured over some tenths of a second, each product waited for."""
        began_s, num_products = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began_s) < SECONDS or not num_products:
            (self._left @ self._right)[0, 0].item()
            num_products += 1
        return 2 * self._size**3 * num_products / seconds
