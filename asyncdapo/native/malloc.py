"""The C library's heap: whether a process keeps the memory that it frees.

In: nothing. Out: freed memory stays in the process, or goes back to the system. Does not own: which of the two is right
for a process. Other C libraries than glibc have no such choice, and nothing changes there.
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
RETURNED_BYTES = 1 << 20


def keep_freed_memory() -> None:
    """Keep up to 1 GiB, for a process that takes and frees large pieces all the time: messages, or tensors. By default
    glibc returns them to the system, and the pages come back one by one, zeroed: that took a quarter of the replay
    server's time, and 2 % of the learner's."""
    _set({M_MMAP_THRESHOLD: LARGEST_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES, M_TOP_PAD: HEAP_BYTES})


def return_freed_memory() -> None:
    """Return every piece of 1 MiB and more to the system. In the heap small things soon stand where a large one was, so
    that there is no room for the next: four ranks with a sharded model held nine times the model after one pass."""
    _set({M_MMAP_THRESHOLD: RETURNED_BYTES})


def _set(options: dict[int, int]) -> None:
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in options.items():
            mallopt(option, value)
