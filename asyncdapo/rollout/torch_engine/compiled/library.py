"""Library: `forward.c`, compiled for a model's sizes (see `native/c_library.py`).

In: a model's shape. Out: the loaded library, or None and a warning where there is no compiler or it fails.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

from asyncdapo.native.c_library import Signature, load_c
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
    functions = {
        "forward": Signature(num_sizes=5, num_arrays=9),
        "sample": Signature(num_sizes=2, num_arrays=3, returns_double=True),
    }
    return load_c(SOURCE, macros, functions, log, "the torch engine")
