"""Log-probs and entropies of the output layer, without its logits: an [N, V] tensor is never made.

In come hidden states, the output layer's weight and the token drawn at each position; out go the log-prob of that token
and the entropy of the distribution it was drawn from, `softmax((hidden @ weight.T + bias) / temperature)`, in nats.
Scores (logits before the temperature) are made one chunk of tokens and vocabulary at a time and made again in backward.
A token may have been drawn from a part of the vocabulary (`DrawnFrom`): then the distribution is over that part.

Invariant: beyond tensors of N, N·H and V·H numbers, forward and backward hold a few chunks of at most CHUNK_ELEMENTS
numbers, whatever N and V are. Forward takes tokens outside and
vocabulary inside, so what it carries along is N numbers. Backward takes vocabulary outside: the float32 sum of a
bfloat16 weight's gradient is then one vocabulary chunk by H and cast once, and what stays whole in float32 is the
hidden states' gradient, N·H, the smaller of the two sums. Products of matrices are in the dtype of the input, all else
in float32 (float64 for float64). Does not own: which positions are asked for, the model, the loss.

Shapes: N tokens, H hidden size, V vocabulary; n, v the tokens and columns of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}
"""Most scores in a chunk, by kind of device and at least COLUMNS; up to four tensors of this size exist at once. In
float32 16 MiB on a CPU, the fastest measured, and 128 MiB on a GPU, which a thousand tokens a product keep busy."""

COLUMNS = 1 << 15
"""Most columns in a chunk. Larger vocabularies are cut evenly, so that a chunk has enough tokens for a fast product."""

ALIGNMENT = 64
"""Cuts of the vocabulary fall on multiples of this, which fast matrix kernels want."""


OUTSIDE = -1e20
"""Score of a token that couldn't be drawn: so low that its probability is 0, and finite so that a chunk may have no
other."""


@dataclass(frozen=True)
class DrawnFrom:
    """Which tokens of the vocabulary each of the N could be; E of them in all, in the order of the N."""

    ends_N: list[int]
    """Behind its last one among the E."""
    is_whole_N: Tensor
    """bool: of the N, those that could be any token, and have none of the E."""
    drawn_E: Tensor
    """int64: which of the N each belongs to."""
    token_ids_E: Tensor
    """int64"""

    def forbid(self, scores_nv: Tensor, rows: slice, columns: slice) -> None:
        """Give the others in a chunk of scores their score."""
        begin, end = ([0, *self.ends_N][at] for at in (rows.start, rows.stop))
        place_e = self.token_ids_E[begin:end] - columns.start
        is_here_e = (place_e >= 0) & (place_e < scores_nv.shape[1])
        outside = ~self.is_whole_N[rows, None].repeat(1, scores_nv.shape[1] + 1)
        outside[self.drawn_E[begin:end] - rows.start, place_e.where(is_here_e, scores_nv.shape[1])] = False
        scores_nv.masked_fill_(outside[:, :-1], OUTSIDE)


def linear_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float,
    bias_V: Tensor | None = None,
    entropy_gradient: bool = False,
    drawn_from: DrawnFrom | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy (nats, without gradient unless asked for), both [N]: float64 for float64
    input, else float32. Gradients are computed for those of hidden, weight and bias that ask for them. `drawn_from`:
    None is the whole vocabulary; each target has to be in its part."""
    return _LinearLogprobs.apply(hidden_NH, weight_VH, bias_V, targets_N, temperature, entropy_gradient, drawn_from)


def compile_chunks() -> None:
    """Fuse the pointwise maths of a chunk with torch.compile, for this process. A second call changes nothing."""
    global chunk_statistics, chunk_gradient
    if chunk_statistics is _chunk_statistics:
        chunk_statistics = torch.compile(_chunk_statistics, dynamic=True)
        chunk_gradient = torch.compile(_chunk_gradient, dynamic=True)


class _LinearLogprobs(torch.autograd.Function):
    """Saved for backward: the inputs, and three numbers a token. With z = scores / temperature these are the largest
    score, the sum of exp(z - max z), and the mean of z - max z; the log-sum-exp is kept as its two terms because their
    sum would lose the small one where scores are large."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, temperature, entropy_gradient, drawn_from):
        weight_VH[:, 0].index_select(0, targets_N)  # raises for a target outside the vocabulary
        max_N, sum_N, mean_N, logp_N = hidden_NH.new_empty((4, len(targets_N)), dtype=_wide(hidden_NH.dtype))
        for rows in _token_chunks(hidden_NH, weight_VH):
            statistics = None
            for columns in _vocabulary_chunks(weight_VH):
                scores_nv = _scores(hidden_NH, weight_VH, bias_V, rows, columns, drawn_from)
                part = chunk_statistics(scores_nv, targets_N[rows] - columns.start, temperature)
                statistics = part if statistics is None else _merge(statistics, part, temperature)
            assert statistics is not None, "a vocabulary has a chunk or more"
            max_N[rows], sum_N[rows], weighted_n, target_n = statistics
            mean_N[rows] = weighted_n / sum_N[rows]
            logp_N[rows] = target_n - max_N[rows]
        log_sum_N = sum_N.log()
        logp_N = logp_N / temperature - log_sum_N
        entropy_N = log_sum_N - mean_N
        ctx.temperature, ctx.drawn_from = temperature, drawn_from
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, max_N, sum_N, mean_N)
        ctx.set_materialize_grads(False)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp_N, grad_entropy_N):
        hidden_NH, weight_VH, bias_V, targets_N, max_N, sum_N, mean_N = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if grad_logp_N is None and grad_entropy_N is None:
            return (None,) * 7
        wide = max_N.dtype
        grad_logp_N = torch.zeros_like(max_N) if grad_logp_N is None else grad_logp_N
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=wide) if wants_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if wants_bias else None
        for columns in _vocabulary_chunks(weight_VH):
            weight_vH = weight_VH[columns]
            # sums: the gradient itself where it is wide
            sum_vH = None if grad_weight_VH is None else grad_weight_VH[columns].to(wide)
            sum_v = None if grad_bias_V is None else grad_bias_V[columns].to(wide)
            for rows in _token_chunks(hidden_NH, weight_VH):
                grad_nv = chunk_gradient(
                    _scores(hidden_NH, weight_VH, bias_V, rows, columns, ctx.drawn_from),
                    targets_N[rows] - columns.start,
                    (max_N[rows], sum_N[rows], mean_N[rows]),
                    grad_logp_N[rows],
                    None if grad_entropy_N is None else grad_entropy_N[rows],
                    ctx.temperature,
                )
                if sum_v is not None:
                    sum_v += grad_nv.sum(0)
                grad_nv = grad_nv.to(weight_VH.dtype)
                if grad_hidden_NH is not None:
                    _add_product(grad_hidden_NH[rows], grad_nv, weight_vH)
                if sum_vH is not None:
                    _add_product(sum_vH, grad_nv.T, hidden_NH[rows])
            if grad_weight_VH is not None and sum_vH is not None:
                grad_weight_VH[columns] = sum_vH
            if grad_bias_V is not None and sum_v is not None:
                grad_bias_V[columns] = sum_v
        if grad_hidden_NH is not None:
            grad_hidden_NH = grad_hidden_NH.to(hidden_NH.dtype)
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None, None, None, None


def _chunk_statistics(scores_nv: Tensor, targets_n: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Of each token, over the columns of a chunk: the largest score; the sums of exp(d) and of exp(d)·d, where d is a
    score's distance from the largest over the temperature; and the target's score, or 0 when it is another chunk's."""
    max_n = scores_nv.amax(1)
    distance_nv = (scores_nv - max_n[:, None]).div_(temperature)
    exp_nv = distance_nv.exp()
    sum_n = exp_nv.sum(1)
    weighted_n = exp_nv.mul_(distance_nv).sum(1)
    is_here_n, index_n1 = _place(targets_n, scores_nv.shape[1])
    return max_n, sum_n, weighted_n, is_here_n * scores_nv.gather(1, index_n1)[:, 0]


def _chunk_gradient(
    scores_nv: Tensor,
    targets_n: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    grad_logp_n: Tensor,
    grad_entropy_n: Tensor | None,
    temperature: float,
) -> Tensor:
    """Gradient of the scores of a chunk: (g·(1[target] - p) - h·p·(log p + entropy)) / temperature, where g and h are
    the gradients of log-prob and entropy. `log p + entropy` is the distance d less its mean."""
    max_n, sum_n, mean_n = statistics
    distance_nv = (scores_nv - max_n[:, None]).div_(temperature)
    scale_n = -1.0 / (sum_n * temperature)
    if grad_entropy_n is None:
        grad_nv = distance_nv.exp_().mul_((grad_logp_n * scale_n)[:, None])
    else:
        offset_n = (grad_logp_n - grad_entropy_n * mean_n) * scale_n
        factor_nv = torch.addcmul(offset_n[:, None], (grad_entropy_n * scale_n)[:, None], distance_nv)
        grad_nv = distance_nv.exp_().mul_(factor_nv)
    is_here_n, index_n1 = _place(targets_n, scores_nv.shape[1])
    return grad_nv.scatter_add_(1, index_n1, (is_here_n * grad_logp_n / temperature)[:, None])


def _place(targets_n: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Whether each target is among the columns of a chunk, and an index, [n, 1], that is always one of them."""
    return (targets_n >= 0) & (targets_n < num_columns), targets_n.clamp(0, num_columns - 1)[:, None]


chunk_statistics, chunk_gradient = _chunk_statistics, _chunk_gradient


def _merge(a: tuple[Tensor, ...], b: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, ...]:
    """The statistics of two chunks of the same tokens as those of one: both moved to the larger maximum."""
    max_n = torch.maximum(a[0], b[0])
    sum_n = weighted_n = 0.0
    for part_max_n, part_sum_n, part_weighted_n, _ in (a, b):
        moved_n = (part_max_n - max_n) / temperature
        sum_n = sum_n + moved_n.exp() * part_sum_n
        weighted_n = weighted_n + moved_n.exp() * (part_weighted_n + moved_n * part_sum_n)
    return max_n, sum_n, weighted_n, a[3] + b[3]


def _scores(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    rows: slice,
    columns: slice,
    drawn_from: DrawnFrom | None,
) -> Tensor:
    scores_nv = _product(hidden_NH[rows], weight_VH[columns].T)
    if bias_V is not None:
        scores_nv.add_(bias_V[columns])
    if drawn_from is not None:
        drawn_from.forbid(scores_nv, rows, columns)
    return scores_nv


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """`into += a @ b`, where `into` is wider than the factors or of their dtype."""
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    else:
        into += _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or float64. Where the device can't give out more digits than it takes in, the result is rounded
    to the dtype of the factors first."""
    wide = _wide(a.dtype)
    if wide == a.dtype or not a.is_cuda:
        return torch.mm(a, b).to(wide)
    return torch.mm(a, b, out_dtype=wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _vocabulary_chunks(weight_VH: Tensor) -> Iterator[slice]:
    return _slices(len(weight_VH), _chunk_width(len(weight_VH)))


def _token_chunks(hidden_NH: Tensor, weight_VH: Tensor) -> Iterator[slice]:
    num_elements = CHUNK_ELEMENTS.get(hidden_NH.device.type, CHUNK_ELEMENTS["cpu"])
    return _slices(len(hidden_NH), max(1, num_elements // _chunk_width(len(weight_VH))))


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _chunk_width(num_columns: int) -> int:
    """Columns of a chunk: the whole vocabulary where it fits, else even parts of it."""
    if num_columns <= COLUMNS:
        return num_columns
    even = math.ceil(num_columns / math.ceil(num_columns / COLUMNS))
    return min(COLUMNS, math.ceil(even / ALIGNMENT) * ALIGNMENT)
