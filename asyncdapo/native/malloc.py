"""The C library's heap, for a process that receives and sends large messages all the time.

In: nothing. Out: freed memory stays in the process, and is used again. Does not own: whose memory it is. A process that
rather gives memory back sets the opposite (`learner/model/sharding`).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of mallopt(3)."""
LARGEST_BYTES = 32 << 20
"""The most for which glibc uses its heap."""
KEPT_BYTES = 1 << 30
HEAP_BYTES = 64 << 20
"""By which the heap grows; glibc keeps the second heap of a thread if it is no larger."""


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory. By default glibc returns large pieces to the system, and for each message the
    pages come back one by one, zeroed: that took a quarter of the replay server's time."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries than glibc have none
        mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_TOP_PAD, HEAP_BYTES)
