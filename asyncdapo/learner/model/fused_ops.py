"""Fused ops: RMS norm, SwiGLU and rotation by `fused.c`, in float32 on a CPU.

In: what Hugging Face's own modules and functions of these names take. Out: what they give, and their gradients. Each is
one pass over memory; PyTorch makes five to ten, and keeps what is between them for the backward pass.

Invariant: results don't depend on the number of threads. Does not own: which modules compute so (`fusing`).

Shapes: H numbers of a row; B sequences, N heads, S tokens, D numbers of a head.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asyncdapo.native.c_library import Signature, load_c

SOURCE = Path(__file__).with_name("fused.c")
ROWS = 64
"""Whose part of a norm's gradient is summed on its own, in fused.c."""
FUNCTIONS = {
    "norm": Signature(num_sizes=3, num_factors=1, num_arrays=4),
    "norm_back": Signature(num_sizes=3, num_arrays=6),
    "swiglu": Signature(num_sizes=2, num_arrays=3),
    "swiglu_back": Signature(num_sizes=2, num_arrays=5),
    "rotate": Signature(num_sizes=5, num_arrays=4),
}

log = logging.getLogger("learner")


@cache
def library() -> ctypes.CDLL | None:
    """None, and a warning, where it can't be compiled."""
    return load_c(SOURCE, {}, FUNCTIONS, log, "what a block computes number by number")


def can_fuse(*tensors: Tensor) -> bool:
    """Whether the ops are for these."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Of rows [..., H]."""
    return _Norm.apply(x, weight_H, epsilon)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of tensors of one shape."""
    return _SwiGLU.apply(gate, up)


def rotate(x_BNSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Each head by the angles of its token, as `rotate_half` of Hugging Face has it; [B, N, S, D]."""
    return _Rotation.apply(x_BNSD, cos_BSD, sin_BSD)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        x, size = x.contiguous(), x.shape[-1]
        out, scales = torch.empty_like(x), x.new_empty(x.numel() // size)
        _loaded().norm(torch.get_num_threads(), len(scales), size, epsilon, *_addresses(x, weight_H, scales, out))
        ctx.save_for_backward(x, weight_H, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_H, scales = ctx.saved_tensors
        grad, grad_x, size = grad.contiguous(), torch.empty_like(x), x.shape[-1]
        grad_weights = x.new_zeros(-(-len(scales) // ROWS), size)
        arrays = _addresses(x, weight_H, scales, grad, grad_x, grad_weights)
        _loaded().norm_back(torch.get_num_threads(), len(scales), size, *arrays)
        return grad_x, grad_weights.sum(0), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _loaded().swiglu(torch.get_num_threads(), gate.numel(), *_addresses(gate, up, out))
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        grad, grads = grad.contiguous(), (torch.empty_like(gate), torch.empty_like(up))
        _loaded().swiglu_back(torch.get_num_threads(), gate.numel(), *_addresses(gate, up, grad, *grads))
        return grads


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BNSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
        angles = cos_BSD.contiguous(), sin_BSD.contiguous()
        ctx.save_for_backward(*angles)
        return _rotated(x_BNSD, *angles, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(grad_BNSD, *ctx.saved_tensors, back=True), None, None


def _rotated(x_BNSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, *, back: bool) -> Tensor:
    """The numbers of a token lie together, as a projection writes them."""
    x_BSND = x_BNSD.transpose(1, 2).contiguous()
    num_sequences, num_tokens, num_heads, head_dim = x_BSND.shape
    out_BSND = torch.empty_like(x_BSND)
    sizes = num_sequences * num_tokens, num_heads, head_dim // 2, int(back)
    _loaded().rotate(torch.get_num_threads(), *sizes, *_addresses(x_BSND, cos_BSD, sin_BSD, out_BSND))
    return out_BSND.transpose(1, 2)


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "`fusing` has asked for it"
    return loaded


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
