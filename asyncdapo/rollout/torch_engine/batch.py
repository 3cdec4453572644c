"""Batch: the sequences that run, one per slot, and what is known about each between two tokens.

Owns who sits in which slot and the tokens sampled so far. Does not own keys and values (`kv_cache.py`), but decides
their places: long sequences stand before short ones, in blocks of slots, so that each block's attention reads only as
far as its own longest sequence, and the slots in use are the first ones. Sequences move only when slots are filled
again or run empty.

Invariant: every active slot is below `num_used`; sequences in a block of slots are at least as long as all in later
blocks, up to what was sampled since the last `arrange`.

Shapes: S slots, B slots in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from asyncdapo.messages import FinishReason, Runs
from asyncdapo.rollout.engine import Sample
from asyncdapo.rollout.torch_engine.kv_cache import round_up
from asyncdapo.rollout.torch_engine.model import Span
from asyncdapo.rollout.torch_engine.scheduler import Job


@dataclass(eq=False)
class Running:
    """One sample of a job that has a slot."""

    job: Job
    index: int
    """Which of the job's samples."""
    past_versions: Runs = field(default_factory=list)
    """Run lengths of all weights before the ones in use."""

    def close_run(self, version: int, num_sampled: int) -> None:
        """All tokens since the last run were sampled with `version`."""
        count = num_sampled - sum(count for _, count in self.past_versions)
        if count:
            self.past_versions.append((version, count))


def _row_dtype(max_tokens: int) -> np.dtype:
    return np.dtype(
        [
            ("active", np.bool_),
            ("greedy", np.bool_),
            ("token", np.int64),  # sampled last; its keys and values are not in the cache yet
            ("position", np.int64),  # of that token
            ("num_sampled", np.uint64),
            ("max_tokens", np.uint64),
            ("seed", np.uint64),
            ("temperature", np.float32),
            ("top_p", np.float32),
            ("top_k", np.int64),
            ("tokens", np.int32, (max_tokens,)),
            ("logprobs", np.float32, (max_tokens,)),
        ],
        align=True,
    )


class Batch:
    """`rows[s]` and `running[s]` describe slot s."""

    def __init__(self, num_slots: int, max_tokens: int, block_size: int) -> None:
        self.rows = np.zeros(num_slots, _row_dtype(max_tokens))
        self.running: list[Running | None] = [None] * num_slots
        self.num_used = 0
        self.num_active = 0
        self._block_size = block_size

    def active_slots(self) -> np.ndarray:
        return np.flatnonzero(self.rows["active"])

    def seat(self, job: Job, count: int) -> list[int]:
        """Put the job's next samples into the slots behind those in use."""
        sampling, slots = job.request.sampling, list(range(self.num_used, self.num_used + count))
        for slot in slots:
            index = job.num_started
            row = self.rows[slot]
            row["active"] = True
            row["greedy"] = sampling.temperature == 0
            row["position"] = len(job.request.prompt_ids) - 1
            row["num_sampled"] = 0
            row["max_tokens"] = sampling.max_tokens
            row["seed"] = job.request.seeds[index]
            row["temperature"] = sampling.temperature or 1.0
            row["top_p"], row["top_k"] = sampling.top_p, sampling.top_k
            self.running[slot] = Running(job, index)
            job.num_started += 1
            job.num_running += 1
        self.num_used += count
        self.num_active += count
        return slots

    def append(self, slots_B: np.ndarray, tokens_B: np.ndarray, logprobs_B: np.ndarray) -> None:
        """One more token for each of these slots; slots that are not active keep what they have."""
        rows = self.rows
        slots_B, tokens_B, logprobs_B = (a[rows["active"][slots_B]] for a in (slots_B, tokens_B, logprobs_B))
        at_B = rows["num_sampled"][slots_B]
        rows["tokens"][slots_B, at_B] = tokens_B
        rows["logprobs"][slots_B, at_B] = logprobs_B
        rows["token"][slots_B] = tokens_B
        rows["num_sampled"][slots_B] += np.uint64(1)
        rows["position"][slots_B] += 1

    def release(self, slot: int) -> Running:
        running = self.running[slot]
        assert running is not None
        self.running[slot] = None
        self.rows["active"][slot] = False
        self.num_active -= 1
        return running

    def sample(self, slot: int, version: int, finish_reason: FinishReason) -> Sample:
        """What was sampled in a slot, the last token with the weights of `version`."""
        row, running = self.rows[slot], self.running[slot]
        assert running is not None
        num_sampled = int(row["num_sampled"])
        running.close_run(version, num_sampled)
        return Sample(
            token_ids=row["tokens"][:num_sampled].copy(),
            logprobs=row["logprobs"][:num_sampled].copy(),
            versions=running.past_versions,
            finish_reason=finish_reason,
        )

    def arrange(self) -> tuple[list[int], list[int]]:
        """Order the active sequences by length in blocks, without holes; the moves (from, to) to do in the cache."""
        active = self.active_slots()
        longest_first = active[np.argsort(-self.rows["position"][active], kind="stable")].tolist()
        sources: list[int] = []
        targets: list[int] = []
        for start in range(0, len(active), self._block_size):
            members = longest_first[start : start + self._block_size]
            places = range(start, start + len(members))
            sources += [slot for slot in members if slot not in places]
            targets += sorted(set(places).difference(members))
        self.rows[targets] = self.rows[sources]
        moved = [self.running[slot] for slot in sources]
        for slot, running in zip(targets, moved, strict=True):
            self.running[slot] = running
        self.num_used = len(active)
        self.rows["active"][self.num_used :] = False
        self.running[self.num_used :] = [None] * (len(self.running) - self.num_used)
        return sources, targets

    def spans(self) -> list[Span]:
        """The slots in use, cut where the number of cache times that attention has to read changes."""
        starts = range(0, self.num_used, self._block_size)
        longest = np.maximum.reduceat(self.rows["position"][: self.num_used], starts).tolist()
        spans: list[Span] = []
        for start, position in zip(starts, longest, strict=True):
            end, num_times = min(start + self._block_size, self.num_used), round_up(position + 1)
            if spans and spans[-1][2] == num_times:
                start = spans.pop()[0]
            spans.append((start, end, num_times))
        return spans
