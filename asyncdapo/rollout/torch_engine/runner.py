"""Runner: continuous batching, one token of every running sequence at a time. Single-threaded, knows no event loop.

    add, withdraw ──▶ Scheduler (waiting) ──▶ Batch (running, by slot) ──▶ step: fill slots, decode, sample, finish
    swap ──▶ the weights of the next token

Owns the pointers to the weights in use, the KV cache and the order of work between two tokens: load new weights, fill
free slots, then sample a token for every running sequence. All samples of a prompt that start with the same weights
share one prefill.

In deterministic mode all forward passes have the same shapes, so that sums are always taken in the same order.

Shapes: see `model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from asyncdapo.errors import EngineError
from asyncdapo.messages import FinishReason
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Limits, Sampled
from asyncdapo.rollout.torch_engine.batch import Batch
from asyncdapo.rollout.torch_engine.model import Model
from asyncdapo.rollout.torch_engine.sampling import narrow
from asyncdapo.rollout.torch_engine.scheduler import Job, Prefill, Scheduler
from asyncdapo.rollout.torch_engine.weights import Weights

BLOCK_SIZE = 16
"""Slots whose attention reads equally far. A GPU has one block: another kernel launch would cost more than it saves."""
PREFILL_TOKENS = 4096
"""Most tokens, padding included, of one prefill pass with more than one prompt."""


@dataclass(kw_only=True)
class Counters:
    """Cumulative since the start."""

    tokens: int = 0
    prefill_tokens: int = 0
    steps: int = 0
    slot_steps: int = 0


@dataclass
class Progress:
    """Result of one step."""

    started: list[Job] = field(default_factory=list)
    """Jobs whose first token was sampled."""
    ended: list[Job] = field(default_factory=list)
    """The job of each sample that ended; those without `num_unfinished` samples are complete."""


class Runner:
    """Generates the samples of the added jobs, with the weights of the last swap."""

    def __init__(
        self, model: Model, config: RolloutConfig, limits: Limits, stop_token_ids: frozenset[int], weights: Weights
    ) -> None:
        self.version = 0
        self.counters = Counters()
        self.device = model.device
        self._model, self._config, self._weights = model, config, weights
        self._max_prompt_length = limits.max_prompt_length
        block_size = BLOCK_SIZE if self.device.type == "cpu" else config.slots
        fixed_times = model.cache.num_times if config.deterministic else None
        self._batch = Batch(config.slots, config.max_response_length, block_size, fixed_times)
        self._scheduler = Scheduler(config.slots, one_at_a_time=config.deterministic)
        self._is_stop_V = np.zeros(limits.vocab_size, np.bool_)
        self._is_stop_V[[token for token in stop_token_ids if token < limits.vocab_size]] = True
        self._slots = np.arange(config.slots)
        self._running: set[Job] = set()

    @property
    def has_work(self) -> bool:
        return bool(self._batch.num_active or self._scheduler)

    def fills(self, num_free: int) -> bool:
        """Whether so many slots that have become free are filled again; fewer wait for others."""
        return num_free >= self._scheduler.min_free

    def add(self, job: Job) -> None:
        self._scheduler.add(job)

    def withdraw(self, job: Job) -> None:
        """Forget the job: its slots are free from now on."""
        self._scheduler.withdraw(job)
        self._running.discard(job)
        for slot, running in self._batch.sequences():
            if running.job is job:
                self._batch.release(slot)

    def so_far(self, job: Job) -> list[Sampled]:
        """What there is of each of its samples by now."""
        found = [sample or Sampled() for sample in job.samples]
        for slot, running in self._batch.sequences():
            if running.job is job:
                found[running.index] = self._batch.so_far(slot, self.version)
        return found

    def swap(self, version: int, weights: Weights) -> Weights:
        """Sample from the next token on with these weights. Returns the old ones."""
        before, self._weights = self._weights, weights
        for slot, running in self._batch.sequences():
            running.close_run(self.version, int(self._batch.num_sampled[slot]))
        for job in self._scheduler.jobs():
            job.prefill = None
        self.version = version
        if self._config.on_update == "recompute":
            self._recompute()
        return before

    def step(self) -> Progress:
        """Fill free slots, then sample one token of every running sequence."""
        progress = Progress()
        self._fill(progress)
        if self._batch.num_active:
            self._decode(progress)
        return progress

    # ------------------------------------------------------------------------------------------------- filling slots

    def _fill(self, progress: Progress) -> None:
        if starts := self._scheduler.take(self._batch.num_active):
            self._prefill([job for job, _ in starts if job.prefill is None])
            self._seat(starts, progress)
        elif self._batch.has_many_gaps and not self._scheduler:
            for source, target in self._batch.close_gaps():
                self._model.cache.move(source, target, int(self._batch.position[target]))

    def _seat(self, starts: Sequence[tuple[Job, int]], progress: Progress) -> None:
        """Give starting samples their slots, the keys and values of their prompt, and their first tokens."""
        seated, logits = [], []
        for job, count in starts:
            if not job.num_started:
                progress.started.append(job)
            slots = self._batch.seat(job, count)
            assert job.prefill is not None, "a job without a prefill has got slots"
            self._model.cache.write(slots, job.prefill.kv)
            seated.append(slots)
            logits.append(job.prefill.logits_1V.expand(count, -1))
            job.prefill = job.prefill if job.num_waiting else None
            job.request.num_sampled += count
            self._running.add(job)
            self.counters.tokens += count
        self._sample(np.concatenate(seated), torch.cat(logits), progress)

    def _prefill(self, jobs: Sequence[Job]) -> None:
        """Once for each different prompt of the jobs. Others that wait with the same prompt get it, too."""
        sharing: dict[bytes, list[Job]] = {job.prompt: [] for job in jobs}
        for job in (*jobs, *self._scheduler.jobs()):
            if job.prompt in sharing:
                sharing[job.prompt].append(job)
        alike = list(sharing.values())
        prompts = [first.request.prompt_ids for first, *_ in alike]
        for chunk, logits_NV, kv in self._forward_all(prompts, self._max_prompt_length):
            for row, prompt in enumerate(chunk):
                for job in alike[prompt]:
                    job.prefill = Prefill(logits_NV[row : row + 1], kv[:, row : row + 1])

    def _recompute(self) -> None:
        """Recompute the keys and values of running sequences, prompt and response, with the weights in use."""
        slots, sequences = [], []
        for slot, running in self._batch.sequences():
            num_sampled = self._batch.num_sampled[slot]
            # The last sampled token isn't in the cache yet: the next decode writes it.
            response = self._batch.tokens[slot, : num_sampled - 1].tolist()
            slots.append(slot)
            sequences.append([*running.job.request.prompt_ids, *response])
        for chunk, _, kv in self._forward_all(sequences, self._model.cache.num_times):
            for row, index in enumerate(chunk):
                self._model.cache.write(np.array([slots[index]]), kv[:, row : row + 1])

    def _forward_all(
        self, sequences: Sequence[Sequence[int]], fixed_length: int
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Run whole sequences through the model, similar lengths together: (indices, logits, keys and values).

        In deterministic mode they run one by one, each padded to `fixed_length`.
        """
        by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        while by_length:
            if self._config.deterministic:
                chunk, num_times = [by_length.pop()], fixed_length
            else:
                num_times = len(sequences[by_length[-1]])
                size = max(1, PREFILL_TOKENS // num_times)
                chunk, by_length = by_length[-size:], by_length[:-size]
            tokens_NT = torch.zeros(len(chunk), num_times, dtype=torch.int64)
            for row, index in enumerate(chunk):
                tokens_NT[row, : len(sequences[index])] = torch.tensor(sequences[index])
            lengths_N = torch.tensor([len(sequences[index]) for index in chunk])
            self.counters.prefill_tokens += int(lengths_N.sum())
            logits_NV, kv = self._model.prefill(self._weights, tokens_NT.to(self.device), lengths_N.to(self.device))
            yield chunk, logits_NV, kv

    # ------------------------------------------------------------------------------------------------------ decoding

    def _decode(self, progress: Progress) -> None:
        logits_BV = self._model.decode(self._weights, self._batch)
        self.counters.steps += 1
        self.counters.slot_steps += self._batch.num_active
        self.counters.tokens += self._batch.num_active
        for job in self._running:
            job.request.num_sampled += job.request.num_running
        self._sample(self._slots[: logits_BV.shape[0]], logits_BV, progress)

    def _sample(self, slots: np.ndarray, logits_BV: torch.Tensor, progress: Progress) -> None:
        """Sample a token for each of these slots, and remove the sequences that it ends."""
        batch = self._batch
        narrowed = np.flatnonzero(batch.narrowed[slots])
        if narrowed.size:
            self._narrow(slots, narrowed, logits_BV)
        if not math.isfinite(self._model.sample(logits_BV, batch, slots)):
            raise EngineError(f"the weights of version {self.version} give logits that are not finite")
        for slot in batch.ended(self._is_stop_V):
            self._finish(slot, "stop" if self._is_stop_V[batch.token[slot]] else "length", progress)

    def _narrow(self, slots: np.ndarray, narrowed: np.ndarray, logits_BV: torch.Tensor) -> None:
        """Leave only the tokens of top-k and top-p in these rows of the slots, and note which."""
        batch = self._batch
        limits = (self._on_device(column[slots[narrowed]]) for column in (batch.temperature, batch.top_k, batch.top_p))
        chosen = self._on_device(narrowed)
        left_RV = narrow(logits_BV[chosen], *limits)
        logits_BV[chosen] = left_RV
        at, token_ids = (left_RV > -torch.inf).nonzero().cpu().numpy().T
        parts = np.split(token_ids.astype(np.int32), np.flatnonzero(np.diff(at)) + 1)
        for slot, left in zip(slots[narrowed].tolist(), parts, strict=True):
            self._batch.note_left(slot, left)

    def _finish(self, slot: int, reason: FinishReason, progress: Progress) -> None:
        sample = self._batch.sample(slot, self.version, reason)
        running = self._batch.release(slot)
        running.job.finish(running.index, sample)
        progress.ended.append(running.job)
        if not running.job.num_unfinished:
            self._running.discard(running.job)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
