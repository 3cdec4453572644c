"""From rows to packed micro-batches: no token is padding, and a prompt stands once for all the responses to it.

    rows ──micro_batches──▶ rows of one forward pass, those of a prompt side by side ──pack──▶ flat tokens

    tokens_S    prompt a │ response a0 │ response a1 │ prompt b │ response b0 │ …

A response attends to its prompt and to itself (`attention_layout`), and its positions follow its prompt's. The last
token of a response predicts nothing, so it isn't computed. The log-prob of a response's first token comes from the
output at the prompt's last token, that of each other one from the output at the token before it.

Invariants: which rows share a micro-batch is a deterministic function of their prompts and lengths; a row is in exactly
one; it holds at most the given number of computed tokens, unless it is a single row that is longer. Parts of the loss
are known per row, so the rows of a prompt may be spread over micro-batches: then each of them has it. Does not own: the
model, the loss, devices, how attention is computed.

Shapes: B rows of a micro-batch, T tokens of its longest response, S tokens that are computed, n loss-bearing
tokens in the order of `loss_mask_BT`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from asyncdapo.learner.attention.attention_layout import Layout, on_device
from asyncdapo.learner.batches.samples import Row
from asyncdapo.learner.model.logprobs import DrawnFrom
from asyncdapo.transport.payload import Support

_NOTHING = np.zeros(1, np.float32)
IDLE = Row(
    index=0,
    prompt=0,
    prompt_ids=np.zeros(1, np.int32),
    token_ids=np.zeros(1, np.int32),
    rollout_logprobs=_NOTHING,
    loss_mask=np.ones(1, bool),
    advantage=0.0,
    staleness=0,
    start_logprobs=_NOTHING,
    correction=_NOTHING,
    trusted=np.ones(1, bool),
    token_staleness=np.zeros(1, np.int32),
    reference_logprobs=_NOTHING,
    weight=0.0,
)
"""A made-up row of one token that counts nothing: what a rank computes while others have rows."""


@dataclass(frozen=True)
class Work:
    """What forward passes were about; parts add."""

    num_tokens: int = 0
    """Prompt and response tokens of the rows, a prompt counted for each of its responses."""
    num_computed_tokens: int = 0
    """Tokens that went through the blocks."""
    num_loss_tokens: int = 0
    """Tokens whose logits were computed."""
    num_pairs: int = 0
    """(query, key) pairs that attention is defined on."""

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(self.counts, other.counts, strict=True)))

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.num_tokens, self.num_computed_tokens, self.num_loss_tokens, self.num_pairs


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes. Column t of a row belongs to token t of its response."""

    tokens_S: Tensor
    """int64"""
    positions_S: Tensor
    """int64: each token's place in its own sequence."""
    layout: Layout
    sources_n: Tensor
    """int64: where in S the output stands that a loss-bearing token is predicted from."""
    targets_n: Tensor
    """int64: the loss-bearing tokens."""
    cells_n: Tensor
    """int64: their cells in a [B, T] rectangle, row after row."""
    drawn_from: DrawnFrom | None
    """What each of them was drawn from; None if all were from the whole vocabulary."""
    loss_mask_BT: Tensor
    """bool; true at the response tokens that bear loss."""
    rollout_logprobs_BT: Tensor
    """As the following ones: 0 behind the end of a response."""
    start_logprobs_BT: Tensor | None
    correction_BT: Tensor | None
    trusted_BT: Tensor | None
    token_staleness_BT: Tensor | None
    """int32"""
    reference_logprobs_BT: Tensor | None
    advantages_B: Tensor
    weights_B: Tensor
    staleness_B: Tensor
    """int64"""
    work: Work

    def rectangle(self, values_n: Tensor) -> Tensor:
        """Numbers of the loss-bearing tokens in their cells, 0 in the others; differentiable, [B, T]."""
        return values_n.new_zeros(self.loss_mask_BT.shape).put(self.cells_n, values_n)

    def flat(self, values_BT: Tensor) -> Tensor:
        """Of a rectangle, or of what broadcasts to one, the numbers of the loss-bearing tokens, [n]."""
        return values_BT.expand(self.loss_mask_BT.shape).reshape(-1)[self.cells_n]


# Which rows share a micro-batch.


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """The rows in micro-batches of at most `max_tokens` computed tokens, about equally many in each, the largest first.
    A row longer than that is alone in one."""
    bundles = [bundle for same in _by_prompt(rows) for bundle in _cut(same, max_tokens)]
    bundles.sort(key=lambda bundle: -num_computed(bundle))
    few = _fill(bundles, max_tokens, num_bins=0)
    even = _fill(bundles, max_tokens, num_bins=len(few))
    bins = even if len(even) == len(few) else few
    bins.sort(key=lambda members: -sum(map(num_computed, members)))
    # Two parts of a prompt may meet in one: then they share it after all.
    return [sorted(sum(members, start=[]), key=lambda row: row.prompt) for members in bins]


def num_computed(bundle: Sequence[Row]) -> int:
    """Tokens that go through the blocks for rows of one prompt in one micro-batch."""
    return len(bundle[0].prompt_ids) + sum(map(_num_behind_prompt, bundle))


def _num_behind_prompt(row: Row) -> int:
    """Of its response: without the last token, which predicts nothing."""
    return len(row.token_ids) - 1


def _by_prompt(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of each prompt, longest first, in the order in which the prompts come up."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row.prompt, []).append(row)
    return [sorted(same, key=lambda row: -row.num_tokens) for same in found.values()]


def _cut(same: list[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Bundles of rows that are computed together: all of a prompt, or as few parts as longest first allows."""
    start, room = 0, max_tokens - len(same[0].prompt_ids)
    for end, row in enumerate(same):
        room -= _num_behind_prompt(row)
        if room < 0 and end > start:
            yield same[start:end]
            start, room = end, max_tokens - num_computed([row])
    yield same[start:]


def _fill(bundles: Sequence[list[Row]], max_tokens: int, num_bins: int) -> list[list[list[Row]]]:
    """Each bundle, in this order, into the bin that has the fewest tokens; a new one where it doesn't fit there."""
    bins: list[list[list[Row]]] = [[] for _ in range(num_bins)]
    loads = [(0, index) for index in range(num_bins)]
    for bundle in bundles:
        num_tokens = num_computed(bundle)
        if loads and (loads[0][0] == 0 or loads[0][0] + num_tokens <= max_tokens):
            load, index = heapq.heappop(loads)
        else:
            load, index = 0, len(bins)
            bins.append([])
        bins[index].append(bundle)
        heapq.heappush(loads, (load + num_tokens, index))
    return bins


# The tensors of a micro-batch.


def pack(rows: Sequence[Row], device: torch.device) -> MicroBatch:
    """The tensors of one forward pass. Neighbouring rows of one prompt share it. No rows at all are an empty
    pass: `IDLE`."""
    rows = rows or [IDLE]
    bundles = [list(bundle) for _, bundle in groupby(rows, key=lambda row: row.prompt)]
    prompt_starts_B, starts_B = _places(bundles)
    num_prompt_B = np.array([len(row.prompt_ids) for row in rows])
    num_behind_B = np.array([_num_behind_prompt(row) for row in rows])
    layout = Layout(prompt_starts_B, num_prompt_B, starts_B, num_behind_B, device)
    shape = (len(rows), max(len(row.token_ids) for row in rows))
    loss_mask_BT = _rectangle([row.loss_mask for row in rows], shape)
    targets_BT = _rectangle([row.token_ids for row in rows], shape)
    steps_T = np.arange(shape[1])
    # The output before a response's first token is its prompt's last one.
    sources_BT = np.where(
        steps_T == 0, (prompt_starts_B + num_prompt_B - 1)[:, None], starts_B[:, None] + steps_T[None] - 1
    )
    cells_n = loss_mask_BT.reshape(-1).nonzero()[0]

    def column(values: Sequence[np.ndarray | None]) -> Tensor | None:
        given = [value for value in values if value is not None]
        return on_device(_rectangle(given, shape), device) if given else None

    pieces = [piece for bundle in bundles for piece in _tokens(bundle)]
    return MicroBatch(
        tokens_S=on_device(np.concatenate(pieces).astype(np.int64), device),
        positions_S=on_device(layout.positions(), device),
        layout=layout,
        sources_n=on_device(sources_BT.reshape(-1)[cells_n], device),
        targets_n=on_device(targets_BT.reshape(-1)[cells_n].astype(np.int64), device),
        cells_n=on_device(cells_n, device),
        drawn_from=_drawn_from(rows, device),
        loss_mask_BT=on_device(loss_mask_BT, device),
        rollout_logprobs_BT=on_device(_rectangle([row.rollout_logprobs for row in rows], shape), device),
        start_logprobs_BT=column([row.start_logprobs for row in rows]),
        correction_BT=column([row.correction for row in rows]),
        trusted_BT=column([row.trusted for row in rows]),
        token_staleness_BT=column([row.token_staleness for row in rows]),
        reference_logprobs_BT=column([row.reference_logprobs for row in rows]),
        advantages_B=on_device(np.array([row.advantage for row in rows], np.float32), device),
        weights_B=on_device(np.array([row.weight for row in rows], np.float64), device),
        staleness_B=on_device(np.array([row.staleness for row in rows], np.int64), device),
        work=Work(sum(row.num_tokens for row in rows), layout.num_tokens, len(cells_n), layout.num_pairs),
    )


def _drawn_from(rows: Sequence[Row], device: torch.device) -> DrawnFrom | None:
    """Of the loss-bearing tokens, row after row."""
    support = Support.join([(row.support and row.support.of(row.loss_mask), row.num_loss_tokens) for row in rows])
    if support is None:
        return None
    drawn_e = np.repeat(np.arange(len(support.counts)), support.counts)
    return DrawnFrom(
        np.cumsum(support.counts).tolist(),
        on_device(support.counts == 0, device),
        on_device(drawn_e, device),
        on_device(support.token_ids.astype(np.int64), device),
    )


def _places(bundles: Iterable[Sequence[Row]]) -> tuple[np.ndarray, np.ndarray]:
    """Where in S each row's prompt and its response begin."""
    prompt_starts, starts, end = [], [], 0
    for bundle in bundles:
        prompt_start, end = end, end + len(bundle[0].prompt_ids)
        for row in bundle:
            prompt_starts.append(prompt_start)
            starts.append(end)
            end += _num_behind_prompt(row)
    return np.array(prompt_starts), np.array(starts)


def _tokens(bundle: Sequence[Row]) -> Iterator[np.ndarray]:
    yield bundle[0].prompt_ids
    for row in bundle:
        yield row.token_ids[:-1]


def _rectangle(values: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    rectangle_BT = np.zeros(shape, values[0].dtype)
    for line_T, of_row in zip(rectangle_BT, values, strict=True):
        line_T[: len(of_row)] = of_row
    return rectangle_BT
