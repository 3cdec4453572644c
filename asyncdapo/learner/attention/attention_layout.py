"""Layout: which tokens of a packed micro-batch are a sequence, in the three forms that attention is computed in.

In: where prompts and responses stand among the S flat tokens. Out, made when attention first asks, once a micro-batch:

    rectangles   for any device and dtype: the sequences, prompt and response, as lines of a few padded rectangles. A
                 shared prompt stands in each of its lines; padding and repetition cost attention only, whose part is
                 small where sequences are short.
    segments     for variable-length kernels: queries stay flat. The queries of a response have the keys of its prompt
                 and its own, which are gathered; where nothing is shared, queries and keys are the same tokens.

    bundles      for `attention.c`: queries and keys stay flat; each prompt, and each response, is a few numbers.

Invariant: all say the same: a token attends to the tokens before it in its own sequence, and to itself. Pure but for
the tensors' device. Does not own: the kernels (`attention`).

Shapes: B sequences, S flat tokens, T tokens of the longest sequence of a rectangle, Q segments, K gathered keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

RECTANGLE_PAIRS = 1 << 15
"""(query, key) pairs of padding that cost as much as a rectangle of its own, measured on a CPU core."""


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copied to a GPU without waiting for what it is at: that takes pinned memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True, eq=False)
class Rectangles:
    """`gathers`: of each rectangle the flat tokens of its cells, int64 [lines, T]. `back_S`: of each flat token the
    cell whose result is its own, counted through all rectangles."""

    gathers: list[Tensor]
    back_S: Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Cumulative lengths int32 [Q + 1]. `keys_K`: the flat tokens whose keys are gathered, int64; none where queries
    and keys are the same."""

    ends_of_queries: Tensor
    ends_of_keys: Tensor
    max_queries: int
    max_keys: int
    keys_K: Tensor | None


@dataclass(frozen=True, eq=False)
class Bundles:
    """Each is a prompt and its responses, and shares no token with others. `segments`, int64 [Q, 4]: the first token of
    the prompt, whose keys come first, its length, the first query, and how many; the prompt itself is the first segment
    of a bundle. `firsts`, int64: the first segment of each bundle, and behind them the number of segments."""

    firsts: Tensor
    segments: Tensor
    longest: int
    """Keys of a segment, at most."""


@dataclass(frozen=True, eq=False)
class Layout:
    """One micro-batch. Rows with the same `prompt_starts_B` are neighbours and share that prompt."""

    prompt_starts_B: np.ndarray
    num_prompt_B: np.ndarray
    starts_B: np.ndarray
    """Of the responses."""
    num_behind_B: np.ndarray
    """Tokens of the responses; may be 0."""
    device: torch.device

    @property
    def num_tokens(self) -> int:
        """S."""
        return int(self.starts_B[-1] + self.num_behind_B[-1])

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs that attend."""
        prompts, behind = self.num_prompt_B[self._is_first], self.num_behind_B
        triangles = (prompts * (prompts + 1)).sum() // 2 + (behind * (behind + 1)).sum() // 2
        return int(triangles + (behind * self.num_prompt_B).sum())

    def positions(self) -> np.ndarray:
        """Each token's place in its sequence, int64 [S]."""
        positions_S = np.empty(self.num_tokens, np.int64)
        for row in range(len(self.starts_B)):
            num_prompt, num_behind = self.num_prompt_B[row], self.num_behind_B[row]
            positions_S[self._prompt(row)] = np.arange(num_prompt)
            positions_S[self._response(row)] = num_prompt + np.arange(num_behind)
        return positions_S

    @cached_property
    def rectangles(self) -> Rectangles:
        gathers, back_S, num_cells = [], np.empty(self.num_tokens, np.int64), 0
        for rows in self._alike():
            width = int((self.num_prompt_B + self.num_behind_B)[rows].max())
            gather = np.zeros((len(rows), width), np.int64)
            for line, row in enumerate(rows):
                tokens = np.r_[self._prompt(row), self._response(row)]
                gather[line, : len(tokens)] = tokens
                back_S[tokens] = num_cells + line * width + np.arange(len(tokens))
            gathers.append(on_device(gather, self.device))
            num_cells += gather.size
        return Rectangles(gathers, on_device(back_S, self.device))

    @cached_property
    def segments(self) -> Segments:
        shares = not self._is_first.all()
        queries, keys = zip(*(self._separate() if shares else self._whole()), strict=True)
        num_queries, num_keys = (np.array([len(part) for part in parts]) for parts in (queries, keys))
        ends = [np.r_[0, lengths.cumsum()].astype(np.int32) for lengths in (num_queries, num_keys)]
        return Segments(
            *(on_device(end, self.device) for end in ends),
            max_queries=int(num_queries.max()),
            max_keys=int(num_keys.max()),
            keys_K=on_device(np.concatenate(keys), self.device) if shares else None,
        )

    @cached_property
    def bundles(self) -> Bundles:
        firsts, segments = [], []
        lengths = zip(self.prompt_starts_B, self.num_prompt_B, self.starts_B, self.num_behind_B, strict=True)
        for is_first, (prompt, num_prompt, start, num_behind) in zip(self._is_first, lengths, strict=True):
            if is_first:
                firsts.append(len(segments))
                segments.append((prompt, 0, prompt, num_prompt))
            segments.append((prompt, num_prompt, start, num_behind))
        longest = int((self.num_prompt_B + self.num_behind_B).max())
        return Bundles(torch.tensor([*firsts, len(segments)]), torch.from_numpy(np.array(segments)), longest)

    def _separate(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Query and key tokens of a prompt, then of each of its responses."""
        for row, is_first in enumerate(self._is_first):
            prompt, response = self._prompt(row), self._response(row)
            if is_first:
                yield prompt, prompt
            if len(response):
                yield response, np.r_[prompt, response]

    def _whole(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for row in range(len(self.starts_B)):
            tokens = np.r_[self._prompt(row), self._response(row)]
            yield tokens, tokens

    @cached_property
    def _is_first(self) -> np.ndarray:
        """Whether a row is the first one of its prompt."""
        return np.r_[True, self.prompt_starts_B[1:] != self.prompt_starts_B[:-1]]

    def _prompt(self, row: int) -> np.ndarray:
        return self.prompt_starts_B[row] + np.arange(self.num_prompt_B[row])

    def _response(self, row: int) -> np.ndarray:
        return self.starts_B[row] + np.arange(self.num_behind_B[row])

    def _alike(self) -> Iterator[np.ndarray]:
        """Rows in rectangles: longest first, a new one where padding would cost more than that."""
        lengths_B = self.num_prompt_B + self.num_behind_B
        order, start, padding = np.argsort(-lengths_B, kind="stable"), 0, 0
        for end, row in enumerate(order):
            padding += int(lengths_B[order[start]] ** 2 - lengths_B[row] ** 2)
            if padding > RECTANGLE_PAIRS:
                yield order[start:end]
                start, padding = end, 0
        yield order[start:]
