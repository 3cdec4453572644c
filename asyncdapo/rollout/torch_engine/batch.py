"""Batch: the running sequences, one per slot, and their state between two tokens.

Owns the assignment of sequences to slots and the tokens sampled so far. Does not own keys and values (`kv_cache.py`),
but decides their places. A sequence starts in the first idle slots. It moves only when nothing waits for the idle ones
and they are many.

Invariant: active slots are below `num_used`; an idle row below it is computed and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from asyncdapo.messages import FinishReason, Runs
from asyncdapo.rollout.engine import Sample, Sampled
from asyncdapo.rollout.torch_engine.kv_cache import Span, round_up
from asyncdapo.rollout.torch_engine.sampling import uniforms
from asyncdapo.rollout.torch_engine.scheduler import Job
from asyncdapo.transport.payload import Support


@dataclass(eq=False)
class Running:
    """One sample of a job that has a slot."""

    job: Job
    index: int
    """Number of this sample in the job."""
    past_versions: Runs = field(default_factory=list)
    """Run lengths of the versions before the one in use."""
    left: list[np.ndarray] = field(default_factory=list)
    """int32: of each token, those that it was drawn from; empty unless top-k or top-p narrow the draws."""

    def close_run(self, version: int, num_sampled: int) -> None:
        """All tokens since the last run were sampled with `version`."""
        count = num_sampled - sum(count for _, count in self.past_versions)
        if count:
            self.past_versions.append((version, count))


class Batch:
    """All arrays, and `running`, have an entry for each slot.

    With `fixed_times`, every step computes all slots and that many times of the cache.
    """

    def __init__(self, num_slots: int, max_tokens: int, block_size: int, fixed_times: int | None = None) -> None:
        self.active = np.zeros(num_slots, np.int64)
        """1 or 0: how much a step adds to position and num_sampled."""
        self.token = np.zeros(num_slots, np.int64)
        """The last sampled token. Its keys and values are not in the cache yet."""
        self.position = np.zeros(num_slots, np.int64)
        """Of that token."""
        self.num_sampled = np.zeros(num_slots, np.int64)
        self.max_tokens = np.zeros(num_slots, np.int64)
        self.temperature = np.ones(num_slots, np.float32)
        self.greedy = np.zeros(num_slots, np.bool_)
        self.narrowed = np.zeros(num_slots, np.bool_)
        """Whether top_k or top_p restrict the draws."""
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float32)
        self.uniforms = np.zeros((num_slots, max_tokens), np.float64)
        self.tokens = np.zeros((num_slots, max_tokens), np.int32)
        self.logprobs = np.zeros((num_slots, max_tokens), np.float32)
        self.running: list[Running | None] = [None] * num_slots
        self.num_used = 0
        self.num_active = 0
        self._block_size = block_size
        self._fixed_times = fixed_times
        self._columns = [column for column in vars(self).values() if isinstance(column, np.ndarray)]
        state = self.active, self.token, self.position, self.num_sampled, self.temperature, self.greedy
        self.addresses = np.array(
            [column.ctypes.data for column in (*state, self.uniforms, self.tokens, self.logprobs)]
        )
        """In the order of `Batch` in forward.c."""

    @property
    def has_many_gaps(self) -> bool:
        """Whether an eighth of the slots in use is idle, so that closing the gaps pays."""
        num_idle = self.num_used - self.num_active
        return self._fixed_times is None and num_idle >= max(1, self.num_used // 8)

    def sequences(self) -> Iterator[tuple[int, Running]]:
        for slot, running in enumerate(self.running[: self.num_used]):
            if running is not None:
                yield slot, running

    def seat(self, job: Job, count: int) -> np.ndarray:
        """Put the job's next samples into the first idle slots. Returns these."""
        request, sampling = job.request, job.request.sampling
        slots = np.flatnonzero(self.active == 0)[:count]
        self.active[slots], self.num_sampled[slots] = 1, 0
        self.position[slots] = len(request.prompt_ids) - 1
        self.max_tokens[slots] = sampling.max_tokens
        self.temperature[slots] = sampling.temperature or 1.0
        self.greedy[slots] = sampling.temperature == 0
        self.narrowed[slots] = sampling.top_k > 0 or sampling.top_p < 1
        self.top_k[slots], self.top_p[slots] = sampling.top_k, sampling.top_p
        seeds = request.seeds[job.num_started : job.num_started + count]
        self.uniforms[slots, : sampling.max_tokens] = uniforms(seeds, sampling.max_tokens, request.num_begun)
        for index, slot in enumerate(slots.tolist(), job.num_started):
            self.running[slot] = Running(job, index)
        job.num_started += count
        job.request.num_running += count
        self.num_used = max(self.num_used, int(slots[-1]) + 1)
        self.num_active += count
        return slots

    def next_uniforms(self, slots: np.ndarray) -> np.ndarray:
        """The uniform number that draws the next token of each of these slots."""
        return self.uniforms[slots, self.num_sampled[slots]]

    def append(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Append a token to each of these slots."""
        num_sampled, active = self.num_sampled[slots], self.active[slots]
        self.tokens[slots, num_sampled] = tokens
        self.logprobs[slots, num_sampled] = logprobs
        self.token[slots] = tokens
        self.position[slots] += active
        self.num_sampled[slots] = num_sampled + active

    def ended(self, is_stop_V: np.ndarray) -> list[int]:
        """The slots whose last token is one to stop at, or the last that fits."""
        is_last = is_stop_V[self.token] | (self.num_sampled == self.max_tokens)
        return np.flatnonzero(is_last & (self.active == 1)).tolist()

    def note_left(self, slot: int, left: np.ndarray) -> None:
        """The next token of a slot is drawn from these."""
        running = self.running[slot]
        assert running is not None, f"slot {slot} is free"
        running.left.append(left)

    def sample(self, slot: int, version: int, finish_reason: FinishReason) -> Sample:
        """The finished sample of a slot. Its last token was sampled with `version`."""
        running, num_sampled = self.running[slot], int(self.num_sampled[slot])
        assert running is not None, f"slot {slot} is free"
        running.close_run(version, num_sampled)
        return Sample(
            token_ids=self.tokens[slot, :num_sampled].copy(),
            logprobs=self.logprobs[slot, :num_sampled].copy(),
            versions=running.past_versions,
            finish_reason=finish_reason,
            support=Support.of_draws(running.left) if running.left else None,
        )

    def so_far(self, slot: int, version: int) -> Sampled:
        """What is sampled in a slot by now. `version` samples at present."""
        running, num_sampled = self.running[slot], int(self.num_sampled[slot])
        assert running is not None, f"slot {slot} is free"
        num_present = num_sampled - sum(count for _, count in running.past_versions)
        return Sampled(
            token_ids=self.tokens[slot, :num_sampled].copy(),
            logprobs=self.logprobs[slot, :num_sampled].copy(),
            versions=[*running.past_versions, *([(version, num_present)] if num_present else [])],
        )

    def release(self, slot: int) -> Running:
        """The slot is free from now on. Returns what ran in it."""
        running = self.running[slot]
        assert running is not None, f"slot {slot} is free"
        running.job.request.num_running -= 1
        self.running[slot] = None
        self._idle(slot)
        self.num_active -= 1
        return running

    def _idle(self, slot: int) -> None:
        """Set values that make an idle row cheap to compute and without effect."""
        self.active[slot] = self.position[slot] = self.num_sampled[slot] = 0
        self.greedy[slot] = self.narrowed[slot] = False

    def close_gaps(self) -> list[tuple[int, int]]:
        """Move the last sequences to idle slots before them. Returns the moves (from, to) that the cache must do."""
        gaps = [slot for slot in range(self.num_active) if self.running[slot] is None]
        behind = [slot for slot in range(self.num_active, self.num_used) if self.running[slot] is not None]
        for source, target in zip(behind, gaps, strict=True):
            for column in self._columns:
                column[target] = column[source]
            self.running[target], self.running[source] = self.running[source], None
            self._idle(source)
        self.num_used = self.num_active
        return list(zip(behind, gaps, strict=True))

    def spans(self) -> list[Span]:
        """The slots to compute, split where the number of cache times that attention reads changes."""
        if self._fixed_times is not None:
            return [(0, len(self.running), self._fixed_times)]
        starts = range(0, self.num_used, self._block_size)
        longest = np.maximum.reduceat(self.position[: self.num_used], starts).tolist()
        spans: list[Span] = []
        for start, position in zip(starts, longest, strict=True):
            end, num_times = min(start + self._block_size, self.num_used), round_up(position + 1)
            joined_start = spans.pop()[0] if spans and spans[-1][2] == num_times else start
            spans.append((joined_start, end, num_times))
        return spans
