"""Attention over packed micro-batches, registered with Hugging Face as the implementation `packed`.

In: queries, keys and values of a block, and the `layout` of the micro-batch, which a model's forward pass hands down as
a keyword. Out: what plain causal attention over every single sequence gives. Without a layout it is plain causal
attention over right-padded rows, as the model's own.

    half precision on a GPU   the variable-length flash kernel of `torch.nn.attention.varlen`: no padding, for
                              heads that it takes
    float32 on a CPU          `attention.c`: no padding, for sequences of up to `MAX_TOKENS` tokens
    everything else           `scaled_dot_product_attention` over a few padded rectangles

`torch.compile` leaves it out (one break in each block's graph), so that no length or layout is compiled in.

Shapes: B sequences, S flat tokens, T tokens of a rectangle, N query heads, M key/value heads, D numbers of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from asyncdapo.errors import ConfigError
from asyncdapo.learner.attention.attention_layout import Layout, Rectangles, Segments
from asyncdapo.learner.attention.compiled_attention import can_compute, compiled_attention
from asyncdapo.model.location import KEY

NAME = "packed"
CHECKED = "packed_checked"
"""The same for a check of the model: under this name Hugging Face asks for masks, which say which window they have."""
HALF = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
"""Of the flash kernel, which also wants multiples of 8."""
UNSUPPORTED = ("softcap", "s_aux", "attention_bias", "position_bias")
"""What some models ask of attention beyond a causal softmax."""


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query_1NSD: Tensor,
    key_1MSD: Tensor,
    value_1MSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """As Hugging Face calls it; returns [1, S, N, D]. Raises ConfigError for attention that is more than causal."""
    if more := [name for name in UNSUPPORTED if asked.get(name) is not None]:
        raise ConfigError(KEY, f"asks its attention for {', '.join(more)}, which the learner doesn't have")
    if attention_mask is not None:
        raise ConfigError(KEY, "makes an attention mask of its own, which the learner doesn't take")
    if layout is None:
        return _causal(query_1NSD, key_1MSD, value_1MSD, scaling, sliding_window).transpose(1, 2), None
    query_SND, key_SMD, value_SMD = (tensor.transpose(1, 2).squeeze(0) for tensor in (query_1NSD, key_1MSD, value_1MSD))
    if can_compute(query_SND, key_SMD, value_SMD, layout, sliding_window):
        return compiled_attention(query_SND, key_SMD, value_SMD, layout.bundles, scaling)[None], None
    if _has_kernel(query_1NSD, value_1MSD):
        return _by_segments(query_SND, key_SMD, value_SMD, layout.segments, scaling, sliding_window)[None], None
    return _by_rectangles(query_SND, key_SMD, value_SMD, layout.rectangles, scaling, sliding_window)[None], None


def checked_attention(
    module: nn.Module,
    query_1NSD: Tensor,
    key_1MSD: Tensor,
    value_1MSD: Tensor,
    attention_mask: Tensor | int | None,
    *,
    sliding_window: int | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` in a model whose masks are from `window_of_mask`. Raises ConfigError where attention is told
    of another window than the mask has: it computes without masks, and short sequences don't show the difference."""
    mask = attention_mask if isinstance(attention_mask, Tensor) else None
    if mask is None and attention_mask != sliding_window:
        windows = f"a window of {attention_mask} tokens, its attention is told {sliding_window}"
        raise ConfigError(KEY, f"can't be trained packed, which is without masks: its mask has {windows}")
    attend: Any = packed_attention  # `torch.compiler.disable` has no types
    return attend(module, query_1NSD, key_1MSD, value_1MSD, mask, sliding_window=sliding_window, **asked)


def window_of_mask(*_: Any, local_size: int | None = None, **__: Any) -> int | None:
    """In place of a mask: how many tokens its rows see, whether they slide or lie in chunks; none for all."""
    return local_size


AttentionInterface.register(NAME, packed_attention)
AttentionInterface.register(CHECKED, checked_attention)
AttentionMaskInterface.register(CHECKED, window_of_mask)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether there is a variable-length kernel for them."""
    head_dim = query.shape[-1]
    fits = head_dim == value.shape[-1] and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM
    return query.is_cuda and query.dtype in HALF and fits


def _by_rectangles(
    query_SND: Tensor,
    key_SMD: Tensor,
    value_SMD: Tensor,
    rectangles: Rectangles,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    results = []
    for gather_BT in rectangles.gathers:
        query_BNTD, key_BMTD, value_BMTD = (
            flat.index_select(0, gather_BT.view(-1)).view(*gather_BT.shape, *flat.shape[1:]).transpose(1, 2)
            for flat in (query_SND, key_SMD, value_SMD)
        )
        results.append(_causal(query_BNTD, key_BMTD, value_BMTD, scaling, window).transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, rectangles.back_S)


def _causal(
    query_BNTD: Tensor, key_BMTD: Tensor, value_BMTD: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Over rows that begin together; [B, N, T, D]."""
    if query_BNTD.is_cuda:  # no kernel but flash's has grouped heads: others would make a [B, N, T, T] tensor
        key_BMTD, value_BMTD = (_for_each_query_head(heads, query_BNTD) for heads in (key_BMTD, value_BMTD))
    num_tokens = query_BNTD.shape[2]
    options: dict[str, Any] = {"is_causal": True}
    if window is not None and window < num_tokens:
        near_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query_BNTD.device)
        options = {"attn_mask": near_TT.tril() & near_TT.triu(1 - window)}
    options["enable_gqa"] = query_BNTD.shape[1] != key_BMTD.shape[1]
    return scaled_dot_product_attention(query_BNTD, key_BMTD, value_BMTD, scale=scaling, **options)


def _by_segments(
    query_SND: Tensor, key_SMD: Tensor, value_SMD: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """The kernel aligns a segment's last query with its last key, which is what a response behind its prompt needs."""
    from torch.nn.attention.varlen import varlen_attn  # asks for the GPU's kernels when it is imported

    if segments.keys_K is not None:
        key_SMD, value_SMD = (gather_rows(flat, segments.keys_K) for flat in (key_SMD, value_SMD))
    # torch 2.11 has no `enable_gqa`
    key_SMD, value_SMD = (_for_each_query_head(flat, query_SND) for flat in (key_SMD, value_SMD))
    result = varlen_attn(
        query_SND.contiguous(),
        key_SMD.contiguous(),
        value_SMD.contiguous(),
        segments.ends_of_queries,
        segments.ends_of_keys,
        segments.max_queries,
        segments.max_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return cast(Tensor, result)  # a pair only when more is asked for


def _for_each_query_head(heads: Tensor, query: Tensor) -> Tensor:
    """Keys or values, their heads in the second dimension, repeated where several query heads share one."""
    num_repeats = query.shape[1] // heads.shape[1]
    return heads.repeat_interleave(num_repeats, dim=1) if num_repeats > 1 else heads


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_SMD: Tensor, rows_K: Tensor) -> Tensor:
        ctx.save_for_backward(rows_K)
        ctx.num_rows = values_SMD.shape[0]
        return values_SMD.index_select(0, rows_K)

    @staticmethod
    def backward(ctx: Any, grad_KMD: Tensor) -> tuple[Tensor, None]:
        (rows_K,) = ctx.saved_tensors
        wide = torch.promote_types(grad_KMD.dtype, torch.float32)
        sums_SMD = grad_KMD.new_zeros(ctx.num_rows, *grad_KMD.shape[1:], dtype=wide)
        return sums_SMD.index_add_(0, rows_K, grad_KMD.to(wide)).to(grad_KMD.dtype), None


def gather_rows(values_SMD: Tensor, rows_K: Tensor) -> Tensor:
    """values[rows], whose gradients are summed in float32 at least: a prompt gets one from each of its responses."""
    return _GatherRows.apply(values_SMD, rows_K)
