"""Compiled attention: packed sequences by `attention.c`, in float32 on a CPU.

In: queries, keys and values of flat tokens, and the bundles of a layout. Out: what the rectangles give, in half of
their time: nothing is gathered or padded, most scores of keys behind a query are left out, and what waits for the
backward pass is inputs, results and a number for each token and head. Where there is no C compiler, a line in the log
says so, and the rectangles compute.

Invariant: results depend neither on the number of threads nor on what else is in the micro-batch.

Shapes: S flat tokens, N query heads, M key/value heads, D numbers of a head.
"""

from __future__ import annotations

import ctypes
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asyncdapo.learner.attention.attention_layout import Bundles, Layout
from asyncdapo.native.c_library import Signature, load_c

SOURCE = Path(__file__).with_name("attention.c")
BLOCK, COLUMNS = 32, 32
"""Queries whose scores exist at once, and columns of a tile at most, in attention.c."""
MAX_TOKENS = 4096
"""Of a sequence: the workspace of a thread grows with it, by six copies of its keys and two rows of scores for each
query of a block."""
NUM_TENSORS = 12

log = logging.getLogger("learner")


def can_compute(query_SND: Tensor, key_SMD: Tensor, value_SMD: Tensor, layout: Layout, window: int | None) -> bool:
    """Whether it is for these; compiles it when it first is."""
    head_dim = query_SND.shape[-1]
    all_float32 = all(tensor.dtype == torch.float32 for tensor in (query_SND, key_SMD, value_SMD))
    return (
        query_SND.device.type == "cpu"
        and all_float32
        and layout.bundles.longest <= min(MAX_TOKENS, window or MAX_TOKENS)
        and head_dim == value_SMD.shape[-1]
        and _library(head_dim) is not None
    )


def compiled_attention(
    query_SND: Tensor, key_SMD: Tensor, value_SMD: Tensor, bundles: Bundles, scaling: float | None
) -> Tensor:
    """Of what `can_compute` accepts; [S, N, D]."""
    scale = 1 / math.sqrt(query_SND.shape[-1]) if scaling is None else scaling
    return _Attention.apply(query_SND, key_SMD, value_SMD, bundles, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_SND: Tensor, key_SMD: Tensor, value_SMD: Tensor, bundles: Bundles, scale: float
    ) -> Tensor:
        inputs = [tensor.contiguous() for tensor in (query_SND, key_SMD, value_SMD)]
        out_SND, logs_SN = torch.empty_like(inputs[0]), query_SND.new_empty(query_SND.shape[:2])
        _call(inputs, out_SND, logs_SN, bundles, scale)
        ctx.save_for_backward(*inputs, out_SND, logs_SN)
        ctx.bundles, ctx.scale = bundles, scale
        return out_SND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SND: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out_SND, logs_SN = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in inputs]
        _call(inputs, out_SND, logs_SN, ctx.bundles, ctx.scale, grad_SND.contiguous(), *gradients)
        return *gradients, None, None


def _call(
    inputs: list[Tensor], out_SND: Tensor, logs_SN: Tensor, bundles: Bundles, scale: float, *gradients: Tensor
) -> None:
    query_SND, key_SMD, _ = inputs
    num_kv_heads, head_dim = key_SMD.shape[1:]
    library, num_threads = _library(head_dim), torch.get_num_threads()
    assert library is not None, "`can_compute` says so"
    size = _workspace_size(head_dim, bundles.longest)
    sizes = num_threads, len(bundles.firsts) - 1, num_kv_heads, query_SND.shape[1] // num_kv_heads, size
    tensors = bundles.firsts, bundles.segments, *inputs, out_SND, logs_SN, torch.zeros(num_threads * size), *gradients
    addresses = [tensor.data_ptr() for tensor in tensors]
    library.attend(*sizes, scale, *addresses, *[None] * (NUM_TENSORS - len(addresses)))


def _workspace_size(head_dim: int, num_keys: int) -> int:
    """float32 numbers of a thread's, as `cut` divides them."""
    keys, width = (-(-number // COLUMNS) * COLUMNS for number in (num_keys, head_dim))
    return 2 * BLOCK * (width + keys) + (2 * head_dim + 4 * width) * keys


@cache
def _library(head_dim: int) -> ctypes.CDLL | None:
    functions = {"attend": Signature(num_sizes=5, num_factors=1, num_arrays=NUM_TENSORS)}
    return load_c(SOURCE, {"HEAD_DIM": head_dim}, functions, log, "the learner's attention")
