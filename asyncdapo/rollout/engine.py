"""The interface between a rollout worker and its inference engine.

An engine takes requests at any time, keeps its slots full by itself, and takes new weights between two tokens while it
generates. Every sampled token comes back with its log-prob and the version of the weights. The log-prob is that of the
weights, the KV cache and the temperature that sampled the token, among the tokens that top-k and top-p have left.

Implementations: `torch_engine` (embedded) and `vllm_engine`; the tests have one of a few lines. An engine doesn't
receive new weights itself: they are passed to `load_weights`, or are already in its processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from asyncdapo.eval_messages import Sampling
from asyncdapo.messages import FinishReason, Runs
from asyncdapo.transport.payload import Support

S = TypeVar("S", bound="Sampled")


def joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """The same, with neighbours of one value as one run."""
    out: Runs = []
    for value, count in runs:
        if out and out[-1][0] == value:
            out[-1] = value, out[-1][1] + count
        else:
            out.append((value, count))
    return out


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What is sampled of one response. `token_ids` int32 [T], `logprobs` float32 [T], versions of these tokens."""

    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    versions: Runs = field(default_factory=list)

    def then(self, more: S) -> S:
        """With the tokens that were sampled behind its own. A `Sample` if that completes it."""
        if not len(self.token_ids):
            return more
        return replace(
            more,
            token_ids=np.concatenate([self.token_ids, more.token_ids]),
            logprobs=np.concatenate([self.logprobs, more.logprobs]),
            versions=joined([*self.versions, *more.versions]),
        )


@dataclass(frozen=True, kw_only=True)
class Sample(Sampled):
    """One sampled response, not scored. A stop token comes last."""

    finish_reason: FinishReason
    support: Support | None = None
    """Of all tokens, if top-k or top-p narrowed the draws. Only the torch engine tells."""


class Priority(IntEnum):
    """Of a request; the lowest goes first."""

    PROBE = 0
    """For a comparison of log-probs, which somebody waits for."""
    CONTINUATION = 1
    """A later turn of an episode: what is begun is ended before anything else begins."""
    FRESH = 2
    """Of a lease or an evaluation: the replay server chooses which of them goes first, and in that order they wait."""


@dataclass(kw_only=True)
class Request:
    """A request for samples of one prompt. The engine updates `num_sampled` and `num_running`, and makes the two
    calls."""

    prompt_ids: list[int]
    seeds: list[int]
    """One per sample. The same seed, prompt and weights draw the same uniform numbers."""
    sampling: Sampling
    num_begun: int = 0
    """So many of the last `prompt_ids` were sampled for this same sample before. The numbers of its seed continue
    behind them."""
    priority: Priority = Priority.FRESH
    """Waiting requests with a lower number go first."""
    seeded: bool = False
    """The seeds have to determine the draws, also where that costs time (vLLM)."""
    on_started: Callable[[int], None] | None = None
    """Called in the event loop with the version that sampled the request's first token."""
    on_sample_done: Callable[[], None] | None = None
    """Called in the event loop whenever a sample is complete and its slot is free."""
    num_sampled: int = field(default=0, init=False)
    """Tokens sampled so far over all samples: the lease's progress."""
    num_running: int = field(default=0, init=False)
    """Samples that have a slot now. If none has, the request waits and makes no progress."""
    handed_back: bool = field(default=False, init=False)
    """Its caller withdraws it as soon as it knows what is sampled (`Continuable`): an engine may end it then."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of an engine. A request beyond them is refused before the engine sees it."""

    max_prompt_length: int
    max_response_length: int
    max_context: int
    """Of prompt and response together."""
    vocab_size: int

    def refuse_unfit(self, request: Request) -> None:
        """Raises ValueError for a request that doesn't fit."""
        sampling, length = request.sampling, len(request.prompt_ids)
        if not 1 <= length - request.num_begun <= self.max_prompt_length:
            raise ValueError(f"a prompt has 1 to {self.max_prompt_length} tokens, got {length}")
        if not 1 <= sampling.max_tokens <= self.max_response_length:
            raise ValueError(f"max_tokens is 1 to {self.max_response_length}, got {sampling.max_tokens}")
        if length + sampling.max_tokens > self.max_context:
            got = f"{length} + {sampling.max_tokens}"
            raise ValueError(f"prompt and max_tokens are at most {self.max_context} together, got {got}")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocab_size:
            got = f"{min(request.prompt_ids)} to {max(request.prompt_ids)}"
            raise ValueError(f"a prompt's token ids are 0 to {self.vocab_size - 1}, got {got}")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise ValueError(f"temperature >= 0, 0 < top_p <= 1 and top_k >= 0 are needed, got {sampling}")
        if not request.seeds:
            raise ValueError("a request needs a seed for each of its samples, got none")


@dataclass(frozen=True, kw_only=True)
class LoadTimes:
    """What new weights cost the running requests, in seconds. Outside these times they continue."""

    pause_s: float = 0.0
    """From the call until generation had stopped."""
    load_s: float
    """From then until the weights were in place; from the call if generation didn't stop."""
    resume_s: float = 0.0
    """From then until generation had resumed."""


class Engine(Protocol):
    """Samples tokens. All methods are called from one event loop."""

    @property
    def num_slots(self) -> int:
        """Sequences generated at once."""
        ...

    @property
    def num_outstanding(self) -> int:
        """Sequences that run or wait. Below `num_slots` the engine has free slots."""
        ...

    @property
    def loaded_version(self) -> int:
        """Version of the weights in use."""
        ...

    @property
    def stops_to_load(self) -> bool:
        """Whether nothing is sampled during `load_weights`."""
        ...

    async def start(self) -> None:
        """Load the model. Raises UserError if the checkpoint can't be used."""

    async def generate(self, request: Request) -> list[Sample]:
        """All samples of the request, in the order of its seeds. Cancelling the task withdraws the request and frees
        its slots. Raises EngineError if the engine fails."""
        ...

    async def load_weights(self, version: int, weights: Any) -> LoadTimes:
        """Switch to these weights between two tokens, and return. The caller gives them up: tensors by Hugging Face
        names, tied ones once (torch), or those already in the engine's own processes (vLLM). Raises WeightsError if
        they don't fit the model; the engine can load others afterwards."""
        ...

    async def ended(self) -> None:
        """Wait until the engine ends. Raises EngineError as soon as it has failed, even if it has no request; returns
        after `stop`."""

    async def stop(self) -> None:
        """Fail every request with EngineError and free the memory."""

    def gauges(self) -> dict[str, float]:
        """Cumulative counters since the start: `tokens` sampled, `prefill_tokens` computed. An engine may add its
        own."""
        ...


@runtime_checkable
class Continuable(Protocol):
    """What an engine has if its samples can be handed to another one before they are complete."""

    async def so_far(self, request: Request) -> list[Sampled]:
        """What there is of each sample of the request by now: a `Sample` of each that is complete. Empty if the request
        has ended."""
        ...
