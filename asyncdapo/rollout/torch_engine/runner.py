"""Runner: continuous batching, one token of every running sequence at a time. Single-threaded, knows no event loop.

    add, withdraw ──▶ Scheduler (who waits) ──▶ Batch (who sits where) ──▶ step: fill slots, decode, sample, finish
    swap ──▶ the weights of the next token

Owns the pointers to the weights in use, the KV cache and the order of things between two tokens: new weights first,
then free slots are filled, then every running sequence gets a token. All samples of a prompt that start with the same
weights share one prefill.

In deterministic mode every forward pass has the same shapes whatever runs, so that sums are taken in the same order.

Shapes: see `model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from asyncdapo.messages import FinishReason
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.torch_engine.batch import Batch
from asyncdapo.rollout.torch_engine.checkpoint import Checkpoint
from asyncdapo.rollout.torch_engine.kv_cache import KVCache
from asyncdapo.rollout.torch_engine.model import Model
from asyncdapo.rollout.torch_engine.sampling import draw, uniforms
from asyncdapo.rollout.torch_engine.scheduler import Job, Prefill, Scheduler
from asyncdapo.rollout.torch_engine.weights import Weights

BLOCK_SIZE = 16
"""Slots whose attention reads equally far; on a GPU one block, since there each kernel launch costs more than it saves."""
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
    """What one step came to."""

    started: list[Job] = field(default_factory=list)
    finished: list[Job] = field(default_factory=list)


class Runner:
    """Generates for the jobs that were added, with the weights of the last swap."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: RolloutConfig,
        max_prompt_length: int,
        stop_token_ids: frozenset[int],
        weights: Weights,
        device: torch.device,
    ) -> None:
        num_positions = max_prompt_length + config.max_response_length
        self.version = 0
        self.counters = Counters()
        self._config = config
        self._max_prompt_length = max_prompt_length
        self._device = device
        self._weights = weights
        self._model = Model(checkpoint, num_positions, device)
        self._cache = KVCache(checkpoint.shape, config.slots, num_positions, weights.norm.dtype, device)
        block_size = BLOCK_SIZE if device.type == "cpu" and not config.deterministic else config.slots
        self._batch = Batch(config.slots, config.max_response_length, block_size)
        self._scheduler = Scheduler(config.slots, one_at_a_time=config.deterministic)
        self._is_stop_V = np.zeros(checkpoint.shape.vocab_size, np.bool_)
        self._is_stop_V[[token for token in stop_token_ids if token < checkpoint.shape.vocab_size]] = True
        self._slots = np.arange(config.slots)

    @property
    def has_work(self) -> bool:
        return bool(self._batch.num_active or self._scheduler)

    def add(self, job: Job) -> None:
        self._scheduler.add(job)

    def withdraw(self, job: Job) -> None:
        """Forget the job: its slots are free from now on."""
        self._scheduler.withdraw(job)
        for slot in self._batch.active_slots().tolist():
            running = self._batch.running[slot]
            if running is not None and running.job is job:
                self._batch.release(slot)

    def swap(self, version: int, weights: Weights) -> Weights:
        """The next token is sampled with these weights. Returns those that were in use."""
        before, self._weights = self._weights, weights
        active = self._batch.active_slots()
        for slot in active.tolist():
            self._batch.running[slot].close_run(self.version, int(self._batch.rows["num_sampled"][slot]))
        for job in self._scheduler.jobs():
            job.prefill = None
        self.version = version
        if self._config.on_update == "recompute":
            self._recompute(active.tolist())
        return before

    def step(self) -> Progress:
        """Fill free slots, then one token of every sequence that runs."""
        progress = Progress()
        self._fill(progress)
        if self._batch.num_active:
            self._decode(progress)
        return progress

    # ------------------------------------------------------------------------------------------------- filling slots

    def _fill(self, progress: Progress) -> None:
        starts = self._scheduler.take(self._batch.num_active)
        idle = self._batch.num_used - self._batch.num_active
        if starts or (idle >= max(1, self._batch.num_used // 8) and not self._config.deterministic):
            self._arrange()
        if not starts:
            return
        self._prefill([job for job, _ in starts if job.prefill is None])
        seated: list[int] = []
        logits_V: list[torch.Tensor] = []
        for job, count in starts:
            slots = self._batch.seat(job, count)
            self._cache.write(slots, job.prefill.kv_L1KTD)
            seated += slots
            logits_V.append(job.prefill.logits_1V.expand(count, -1))
            if job.num_running == job.num_started:
                progress.started.append(job)
            if not job.num_waiting:
                job.prefill = None
        self._sample(np.array(seated), torch.cat(logits_V), progress)

    def _arrange(self) -> None:
        sources, targets = self._batch.arrange()
        if sources:
            self._cache.move(sources, targets, int(self._batch.rows["position"][targets].max()))

    def _prefill(self, jobs: Sequence[Job]) -> None:
        prompts = [job.request.prompt_ids for job in jobs]
        for chunk, logits_NV, kv_LNKTD in self._forward_all(prompts, self._max_prompt_length):
            for row, prompt in enumerate(chunk):
                num_tokens = len(prompts[prompt])
                kv_L1KTD = kv_LNKTD[:, row : row + 1, :, :num_tokens]  # noqa: N806
                jobs[prompt].prefill = Prefill(logits_NV[row : row + 1], kv_L1KTD)

    def _recompute(self, slots: Sequence[int]) -> None:
        """Keys and values of running sequences, prompt and response so far, with the weights in use."""
        sequences = []
        for slot in slots:
            row = self._batch.rows[slot]
            # The token sampled last isn't in the cache yet: the next decode writes it.
            response = row["tokens"][: int(row["num_sampled"]) - 1].tolist()
            sequences.append([*self._batch.running[slot].job.request.prompt_ids, *response])
        for chunk, _, kv_LNKTD in self._forward_all(sequences, self._cache.num_times):
            for row, sequence in enumerate(chunk):
                num_tokens = len(sequences[sequence])
                self._cache.write([slots[sequence]], kv_LNKTD[:, row : row + 1, :, :num_tokens])

    def _forward_all(self, sequences: Sequence[Sequence[int]], fixed_length: int):
        """Whole sequences through the model, those of similar length together: (indices, logits, keys and values)."""
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
            logits_NV, kv_LNKTD = self._model.prefill(
                self._weights, tokens_NT.to(self._device), lengths_N.to(self._device)
            )
            yield chunk, logits_NV, kv_LNKTD

    # ------------------------------------------------------------------------------------------------------ decoding

    def _decode(self, progress: Progress) -> None:
        batch = self._batch
        if self._config.deterministic:
            num_used, spans = self._config.slots, [(0, self._config.slots, self._cache.num_times)]
        else:
            num_used, spans = batch.num_used, batch.spans()
        logits_BV = self._model.decode(
            self._weights,
            self._cache,
            self._on_device(batch.rows["token"][:num_used]),
            self._on_device(batch.rows["position"][:num_used]),
            spans,
        )
        self.counters.steps += 1
        self.counters.slot_steps += batch.num_active
        self._sample(self._slots[:num_used], logits_BV, progress)

    def _sample(self, slots_B: np.ndarray, logits_BV: torch.Tensor, progress: Progress) -> None:
        """Draw a token for each of these slots, and take out the sequences that it ends."""
        rows = self._batch.rows
        greedy_B, top_k_B, top_p_B = rows["greedy"][slots_B], rows["top_k"][slots_B], rows["top_p"][slots_B]
        tokens, logprobs = draw(
            logits_BV,
            self._on_device(rows["temperature"][slots_B]),
            self._on_device(uniforms(rows["seed"][slots_B], rows["num_sampled"][slots_B])),
            greedy_B=self._on_device(greedy_B) if greedy_B.any() else None,
            narrowing=(self._on_device(top_k_B), self._on_device(top_p_B))
            if (top_k_B > 0).any() or (top_p_B < 1).any()
            else None,
        )
        tokens_B = tokens.cpu().numpy()
        self._batch.append(slots_B, tokens_B, logprobs.cpu().numpy())
        stopped_B = self._is_stop_V[tokens_B]
        ended_B = rows["active"][slots_B] & (stopped_B | (rows["num_sampled"][slots_B] == rows["max_tokens"][slots_B]))
        self._count(slots_B)
        for at in np.flatnonzero(ended_B).tolist():
            self._finish(int(slots_B[at]), "stop" if stopped_B[at] else "length", progress)

    def _count(self, slots_B: np.ndarray) -> None:
        for slot in slots_B.tolist():
            running = self._batch.running[slot]
            if running is not None:
                running.job.request.num_sampled += 1
                self.counters.tokens += 1

    def _finish(self, slot: int, reason: FinishReason, progress: Progress) -> None:
        sample = self._batch.sample(slot, self.version, reason)
        running = self._batch.release(slot)
        running.job.finish(running.index, sample)
        if not running.job.num_unfinished:
            progress.finished.append(running.job)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
