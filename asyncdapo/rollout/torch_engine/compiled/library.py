"""Library: `forward.c`, compiled for a model's sizes (see `native/c_library.py`).

In: a model's shape. Out: the loaded library, or None and a warning where there is no compiler or it fails.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

from asyncdapo.native.c_library import CompilerError, compile_c
from asyncdapo.rollout.torch_engine.checkpoint import ModelShape

SOURCE = Path(__file__).with_name("forward.c")

log = logging.getLogger("rollout")


@cache
def compiled_library(shape: ModelShape) -> ctypes.CDLL | None:
    """None, and a warning, where there is no compiler or it fails."""
    macros = {
        "LAYERS": shape.num_layers,
        "HIDDEN": shape.hidden_size,
        "INTERMEDIATE": shape.intermediate_size,
        "KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "VOCABULARY": shape.vocab_size,
        "EPSILON": f"{shape.norm_eps:.9e}f",
    }
    try:
        library = compile_c(SOURCE, macros)
    except CompilerError as error:
        log.warning("the torch engine is half as fast as with a C compiler (CC, or cc): %s", error)
        return None
    for function, num_sizes, num_arrays in ((library.forward, 5, 9), (library.sample, 2, 3)):
        function.argtypes = [ctypes.c_int64] * num_sizes + [ctypes.c_void_p] * num_arrays
    library.forward.restype, library.sample.restype = None, ctypes.c_double
    return library
