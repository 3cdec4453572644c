"""Compiled model: the forward pass and the draw by `forward.c` (see `library.py`).

In: as `model.py`. Out: the same numbers, in float32 on a CPU, in half of the time. Where there is no C compiler, a line
in the log says so, and PyTorch computes.

A row of a pass doesn't depend on the others to the last bit. So the tokens of a prompt are rows like all others.

Shapes: as in `model.py`; S slots, C chunks of times, X numbers of a chunk's keys and values.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from asyncdapo.rollout.torch_engine.batch import Batch
from asyncdapo.rollout.torch_engine.checkpoint import Checkpoint, ModelShape
from asyncdapo.rollout.torch_engine.compiled.library import compiled_library
from asyncdapo.rollout.torch_engine.compiled.packed_weights import PackedWeights
from asyncdapo.rollout.torch_engine.kv_cache import TIME_STEP, round_up
from asyncdapo.rollout.torch_engine.model import Model, TorchModel, rotations

VALUE_STEP, TILE = 16, 8
"""What values are filled up to, and rows that are multiplied at once, in forward.c."""


def fastest_model(
    checkpoint: Checkpoint, num_slots: int, max_times: int, dtype: torch.dtype, device: torch.device, num_threads: int
) -> Model:
    """The model with a slot for each of `num_slots` sequences of at most `max_times` tokens."""
    if device.type == "cpu" and dtype == torch.float32 and (library := compiled_library(checkpoint.shape)):
        return CompiledModel(checkpoint, library, num_slots, max_times, num_threads)
    return TorchModel(checkpoint, num_slots, max_times, dtype, device)


class ChunkCache:
    """Keys and values of each slot, chunk after chunk: [L, S, K, C, X]."""

    def __init__(self, shape: ModelShape, num_slots: int, num_times: int) -> None:
        self.num_times = round_up(num_times)
        size = TIME_STEP * (shape.head_dim + round_up(shape.head_dim, VALUE_STEP))
        num_chunks = self.num_times // TIME_STEP
        self.data = torch.zeros(shape.num_layers, num_slots, shape.num_kv_heads, num_chunks, size)
        self._array = self.data.numpy()  # which copies whole chunks; PyTorch would copy number by number

    def write(self, slots: np.ndarray, kv: torch.Tensor) -> None:
        self._array[:, slots, :, : kv.shape[3]] = kv.numpy()

    def move(self, source: int, target: int, num_times: int) -> None:
        num_chunks = round_up(num_times) // TIME_STEP
        self.data[:, target, :, :num_chunks] = self.data[:, source, :, :num_chunks]


class CompiledModel:
    """The model in a loaded library; computes in `num_threads` threads."""

    def __init__(
        self, checkpoint: Checkpoint, library: ctypes.CDLL, num_slots: int, max_times: int, num_threads: int
    ) -> None:
        self.device = torch.device("cpu")
        self.cache = ChunkCache(checkpoint.shape, num_slots, max_times)
        self._shape, self._library, self._num_threads = checkpoint.shape, library, num_threads
        self._rotations_TP = rotations(checkpoint, self.cache.num_times)
        self._slots_S = torch.arange(num_slots)
        self._workspace = self._new_workspace(num_slots)

    def new_weights(self) -> PackedWeights:
        return PackedWeights(self._shape)

    def decode(self, weights: PackedWeights, batch: Batch) -> torch.Tensor:
        slots_B = self._slots_S[: batch.num_used]
        tokens_B, positions_B = (torch.from_numpy(column[: batch.num_used]) for column in (batch.token, batch.position))
        return self._forward(weights, self.cache, self._workspace, tokens_B, slots_B, positions_B, slots_B)

    def prefill(
        self, weights: PackedWeights, tokens_NT: torch.Tensor, lengths_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_prompts, num_times = tokens_NT.shape
        is_token_NT = torch.arange(num_times) < lengths_N.unsqueeze(1)
        prompts_M, positions_M = is_token_NT.nonzero().T.contiguous()
        cache, workspace = ChunkCache(self._shape, num_prompts, num_times), self._new_workspace(len(prompts_M))
        tokens_M, last_N = tokens_NT[is_token_NT], lengths_N.cumsum(0) - 1
        logits_NV = self._forward(weights, cache, workspace, tokens_M, prompts_M, positions_M, last_N)
        return logits_NV, cache.data

    def sample(self, logits_BV: torch.Tensor, batch: Batch, slots: np.ndarray) -> float:
        logits_BV = logits_BV.contiguous()
        arrays = logits_BV.data_ptr(), slots.ctypes.data, batch.addresses.ctypes.data
        return self._library.sample(len(slots), batch.tokens.shape[1], *arrays)

    def _forward(
        self,
        weights: PackedWeights,
        cache: ChunkCache,
        workspace: torch.Tensor,
        tokens_M: torch.Tensor,
        slots_M: torch.Tensor,
        positions_M: torch.Tensor,
        out_N: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [N, V] behind the rows `out_N` of these tokens."""
        num_out = out_N.shape[0]
        logits_NV = torch.empty(round_up(num_out, TILE), self._shape.vocab_size)
        _, num_slots, _, num_chunks, _ = cache.data.shape
        sizes = self._num_threads, tokens_M.shape[0], num_out, num_slots, num_chunks
        rows = tokens_M, slots_M, positions_M, out_N
        tensors = *rows, weights.addresses, self._rotations_TP, cache.data, workspace, logits_NV
        self._library.forward(*sizes, *(tensor.data_ptr() for tensor in tensors))
        return logits_NV[:num_out]

    def _new_workspace(self, num_rows: int) -> torch.Tensor:
        shape = self._shape
        num_heads = 2 * (shape.num_heads + shape.num_kv_heads)
        size = 2 * shape.hidden_size + num_heads * shape.head_dim + 3 * shape.intermediate_size
        return torch.empty(round_up(num_rows, TILE) * size)
