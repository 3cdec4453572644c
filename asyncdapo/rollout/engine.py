"""The seam between a rollout worker and what samples tokens.

An engine takes requests at any time, keeps its slots full by itself, and takes new weights between two tokens while it
generates. Every sampled token comes back with its log-prob under the weights, the KV cache and the temperature that
sampled it, and with the version of those weights.

Implementations: `torch_engine` (embedded) and `vllm_engine`. The tests have one of a few lines. How new weights reach
an engine's process is not the engine's: `load_weights` gets them, or finds them where they were received for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from asyncdapo.messages import FinishReason, Runs, Sampling


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled response, unscored. `token_ids` int32 [T] (a stop token is its last), `logprobs` float32 [T]."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: Runs
    finish_reason: FinishReason


@dataclass(kw_only=True)
class Request:
    """Samples of one prompt. The engine writes `num_sampled` and `num_running` as it goes, and makes the two calls."""

    prompt_ids: list[int]
    seeds: list[int]
    """One per sample; the same seed, prompt and weights draw the same uniform numbers."""
    sampling: Sampling
    urgent: bool = False
    """Ahead of every waiting request that isn't (evaluation)."""
    on_started: Callable[[int], None] | None = None
    """Called in the event loop with the version that sampled the request's first token."""
    on_sample_done: Callable[[], None] | None = None
    """Called in the event loop whenever one of the samples is finished and no longer outstanding: there is room."""
    num_sampled: int = field(default=0, init=False)
    """Tokens sampled so far over all samples: the lease's progress."""
    num_running: int = field(default=0, init=False)
    """Samples that have a slot now; without one the request waits, and makes no progress of its own."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an engine can take. Anything else is refused before the engine sees it."""

    max_prompt_length: int
    max_response_length: int
    vocab_size: int

    def refuse_unfit(self, request: Request) -> None:
        """Raises ValueError for a request that doesn't fit."""
        sampling, length = request.sampling, len(request.prompt_ids)
        if not 1 <= length <= self.max_prompt_length:
            raise ValueError(f"a prompt has 1 to {self.max_prompt_length} tokens, got {length}")
        if not 1 <= sampling.max_tokens <= self.max_response_length:
            raise ValueError(f"max_tokens is 1 to {self.max_response_length}, got {sampling.max_tokens}")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocab_size:
            got = f"{min(request.prompt_ids)} to {max(request.prompt_ids)}"
            raise ValueError(f"a prompt's token ids are 0 to {self.vocab_size - 1}, got {got}")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise ValueError(f"temperature >= 0, 0 < top_p <= 1 and top_k >= 0 are needed, got {sampling}")
        if not request.seeds:
            raise ValueError("a request needs a seed for each of its samples, got none")


@dataclass(frozen=True, kw_only=True)
class LoadTimes:
    """What new weights cost the requests in flight, in seconds; they go on during whatever isn't counted here."""

    pause_s: float = 0.0
    """Until nothing was generated any more."""
    load_s: float
    """From then (or from the call, where generation goes on) until the weights were in place."""
    resume_s: float = 0.0
    """From then until generation went on."""


class Engine(Protocol):
    """Samples tokens. All methods are called from one event loop."""

    @property
    def num_slots(self) -> int:
        """Sequences generated at once."""

    @property
    def num_outstanding(self) -> int:
        """Sequences that run or wait; below `num_slots` the engine has room."""

    @property
    def loaded_version(self) -> int:
        """Version of the weights in use."""

    async def start(self) -> None:
        """Load the model. Raises UserError for a checkpoint that can't be used."""

    async def generate(self, request: Request) -> list[Sample]:
        """All samples of the request, in the order of its seeds. Cancelling the task withdraws it and frees its slots.
        Raises EngineError once the engine can't go on."""

    async def load_weights(self, version: int, weights: Any) -> LoadTimes:
        """Use these weights from a boundary between two tokens on; returns then. They are the engine's from the call
        on: tensors by Hugging Face names, tied ones once (torch), or what the engine's own processes hold (vLLM).
        Raises WeightsError for weights that aren't this model's; another call may then bring others."""

    async def ended(self) -> None:
        """Lasts as long as the engine can generate. Raises EngineError at once when it can't any more, asked or not;
        returns after `stop`."""

    async def stop(self) -> None:
        """End every request with EngineError and free the memory."""

    def gauges(self) -> dict[str, float]:
        """Cumulative counters since the start: `tokens` sampled, `prefill_tokens` computed, `busy_s`, `idle_s`, and an
        engine's own."""
