"""A process that takes a step on request and reports how long it took. Imports nothing of asyncdapo or torch.

    standard input   `warm` or `step` a line; its end ends the process
    standard output  a line of JSON for each, and one before the first: ready

What else the process or its libraries print goes to standard error. Peak memory is that of the timed steps: on a GPU
what torch had allocated, on a CPU the growth of the resident memory since the model was loaded, so gradients, optimizer
states and activations, but not the weights. Used by path from another environment too, so it stands alone. Does not
own: what a step is.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType


class Turns:
    """The wire, the clock and the memory of one process. `torch`: the module, where the process has imported it."""

    def __init__(self, torch: ModuleType, on_gpu: bool) -> None:
        self._wire = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._torch, self._on_gpu = torch, on_gpu
        self._base_bytes, self._began_s, self._measured = 0, 0.0, False

    def ready(self, **facts: object) -> None:
        """The model is loaded: memory grows from here."""
        self._base_bytes = 0 if self._on_gpu else _status_bytes("VmRSS")
        self._say(facts)

    def wait(self) -> bool:
        """Wait for the next turn and start the clock; False when there is none any more."""
        line = sys.stdin.readline().strip()
        if line == "step" and not self._measured:
            self._measured = True
            self._forget_peak()
        self._settle()
        self._began_s = time.perf_counter()
        return bool(line)

    def done(self, **facts: object) -> None:
        """The step is over."""
        self._settle()
        seconds = time.perf_counter() - self._began_s
        self._say({"seconds": seconds, "peak_bytes": self._peak_bytes(), **facts})

    def _say(self, facts: dict[str, object]) -> None:
        self._wire.write(json.dumps(facts) + "\n")

    def _settle(self) -> None:
        if self._on_gpu:
            self._torch.cuda.synchronize()

    def _forget_peak(self) -> None:
        if self._on_gpu:
            self._torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of this process begins anew

    def _peak_bytes(self) -> int:
        if self._on_gpu:
            return self._torch.cuda.max_memory_allocated()
        return _status_bytes("VmHWM") - self._base_bytes


def _status_bytes(key: str) -> int:
    """Resident memory of this process, VmRSS now or VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024
