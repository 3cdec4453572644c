"""Loss scale: what a float16 learner multiplies the loss by before its backward pass, and divides the gradient by.

float16 rounds an eighth as much as bfloat16, so that engine and learner agree better (Qi et al., 2025, arXiv
2510.26788). But it has nothing between 0 and 6e-8, where the gradients of single tokens of a large update are, and its
largest number is 65,504. So the scale is as large as it may be (Micikevicius et al., 2018, arXiv 1710.03740): halved
when a gradient overflows, doubled after many updates that don't. The numbers are those of PyTorch's GradScaler.

Invariants: a power of two, so that scaling rounds nothing; the same at every rank; 1 in other formats, for ever.
"""

from __future__ import annotations

FIRST = 2.0**16
NUM_GOOD = 2000
"""Updates in a row without an overflow, after which it is doubled."""


class LossScale:
    """`value` is the scale of the next update; `on` in float16."""

    def __init__(self, *, on: bool) -> None:
        self.value = FIRST if on else 1.0
        self.on, self._num_good = on, 0

    def overflowed(self) -> bool:
        """Halve it for the next update. False if it is at its least: then the scale is not what is wrong."""
        if self.value == 1.0:
            return False
        self.value, self._num_good = self.value / 2, 0
        return True

    def fitted(self) -> None:
        """Count an update without an overflow."""
        if not self.on:
            return
        self._num_good += 1
        if self._num_good == NUM_GOOD:
            self.value, self._num_good = self.value * 2, 0

    def state(self) -> tuple[float, int]:
        """For a checkpoint."""
        return self.value, self._num_good

    def restore(self, state: tuple[float, int]) -> None:
        """Resume from a checkpoint; from one of another format, begin anew."""
        if self.on and state[0] > 1.0:
            self.value, self._num_good = state
