"""CRC-32 of large buffers, several times as fast as by zlib, where the processor multiplies without carries (x86).

In: bytes, and the CRC of those before them. Out: what `zlib.crc32` says of them, which this is for small buffers, and
where there is no C compiler. Does not own: what is checked, and what follows from it.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from asyncdapo.native.c_library import Signature, load_c

SOURCE = Path(__file__).with_name("crc32.c")
BLOCK_BYTES = 64
ALL_BITS = 0xFFFFFFFF
Rest = ctypes.c_uint32 * 4
SMALL = 4 << 10
"""Bytes or numbers, below which the call costs what it saves."""

log = logging.getLogger("transport")


def crc32(buffer: bytes | memoryview, crc: int = 0) -> int:
    """As `zlib.crc32`. The first large buffer of a process waits for the library."""
    library = _library() if len(buffer) >= SMALL else None
    if library is None:
        return zlib.crc32(buffer, crc)
    view = memoryview(buffer).cast("B")
    num_blocks, rest = len(view) // BLOCK_BYTES, Rest(crc ^ ALL_BITS)  # zlib inverts the number before and after
    address, _ = np.frombuffer(view, np.uint8).__array_interface__["data"]
    library.fold(num_blocks, address, rest)
    return zlib.crc32(view[num_blocks * BLOCK_BYTES :], zlib.crc32(rest, ALL_BITS))


@cache
def _library() -> ctypes.CDLL | None:
    """None where zlib is all there is."""
    if platform.machine() != "x86_64":
        return None
    return load_c(SOURCE, {}, {"fold": Signature(num_sizes=1, num_arrays=2)}, log, "the checksum of large groups")
