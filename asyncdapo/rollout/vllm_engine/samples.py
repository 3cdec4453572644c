"""Samples: collects what vLLM streams of each sequence into a `Sample`, and the samples of a request.

In: vLLM's completion outputs, each with the tokens sampled since the last. Out: token ids, log-probs, and the version
of every token. From 0.27 on, vLLM itself labels tokens with versions, and an output may have tokens of two of them. For
older releases the caller labels each output, which is right because all are drained before a version changes.
"""

# vLLM is an extra, and may not be installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncdapo.messages import FinishReason, Runs
from asyncdapo.rollout.engine import Request, Sample, Sampled
from asyncdapo.transport.payload import LOGPROB_DTYPE, TOKEN_DTYPE

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


class Job:
    """A request and the state of its samples."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.samples: list[Sample | None] = [None] * len(request.seeds)
        self.num_unfinished = len(self.samples)
        self.started = False
        self.streams: dict[int, Stream] = {}
        """Of the samples that run, by index."""
        self.followers: dict[str, asyncio.Task[None] | None] = {}
        """By vLLM's ids of the unfinished samples: who collects their tokens."""

    def finish(self, index: int, sample: Sample) -> None:
        self.samples[index] = sample
        self.num_unfinished -= 1

    def so_far(self) -> list[Sampled]:
        """What there is of each of its samples by now."""
        streams = (self.streams.get(index, Stream()) for index in range(len(self.samples)))
        return [sample or stream.so_far() for sample, stream in zip(self.samples, streams, strict=True)]


class Stream:
    """Collects the tokens of one sequence."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: Runs = []

    def add(self, output: CompletionOutput, version: int) -> int:
        """Add the new tokens, sampled by `version` unless the output says otherwise. Returns their number."""
        num_tokens = len(output.token_ids)
        if num_tokens:
            self.token_ids += output.token_ids
            self._logprobs += _logprobs_of(output.token_ids, output.logprobs)
            self._label(version, num_tokens)
        spans = getattr(output, "weight_versions", None)
        if spans is not None:  # they may be of more tokens than those that have come
            ends = [min(span.end, len(self.token_ids)) for span in spans]
            runs = [(int(span.version), end - span.start) for span, end in zip(spans, ends, strict=True)]
            self._versions = [(version, count) for version, count in runs if count > 0]
        return num_tokens

    def finish(self, finish_reason: FinishReason) -> Sample:
        sampled = self.so_far()
        return Sample(**vars(sampled), finish_reason=finish_reason)

    def so_far(self) -> Sampled:
        return Sampled(
            token_ids=np.array(self.token_ids, TOKEN_DTYPE),
            logprobs=np.array(self._logprobs, LOGPROB_DTYPE),
            versions=list(self._versions),
        )

    def _label(self, version: int, num_tokens: int) -> None:
        if self._versions and self._versions[-1][0] == version:
            num_tokens += self._versions.pop()[1]
        self._versions.append((version, num_tokens))


def _logprobs_of(token_ids: Sequence[int], logprobs: Any) -> list[float]:
    """Log-probs of the sampled tokens. vLLM gives a flat list, or a dict for each position."""
    flat = getattr(logprobs, "logprobs", None)
    if flat is not None:
        return flat
    return [position[token_id].logprob for position, token_id in zip(logprobs, token_ids, strict=True)]
