"""Scheduler: decides which waiting samples start when slots become free. Pure Python, no tensors of its own.

Requests wait by priority, then in order of arrival. A request's samples start in order, as many as there are free
slots; the rest wait at the head of the queue. Slots are filled again when a sixteenth of them is free: doing so for
every single slot would cost as much as a few idle slots do.

In deterministic mode a request starts only when nothing runs, and never shares the slots with another.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncdapo.rollout.engine import Priority, Request, Sample

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prefill:
    """A prompt's logits [1, V] and its keys and values [L, 1, …], made with the weights in use."""

    logits_1V: torch.Tensor
    kv: torch.Tensor


@dataclass(eq=False)
class Job:
    """A request and the state of its samples."""

    request: Request
    samples: list[Sample | None] = field(init=False)
    num_unfinished: int = field(init=False)
    num_started: int = field(default=0, init=False)
    prefill: Prefill | None = field(default=None, init=False)
    """Shared by all samples that wait with the same prompt; dropped at a weight update."""
    prompt: bytes = field(init=False)
    """Equal for jobs with the same prompt."""

    def __post_init__(self) -> None:
        self.prompt = array("i", self.request.prompt_ids).tobytes()
        self.samples = [None] * len(self.request.seeds)
        self.num_unfinished = len(self.samples)

    @property
    def num_waiting(self) -> int:
        return len(self.samples) - self.num_started

    def finish(self, index: int, sample: Sample) -> None:
        self.samples[index] = sample
        self.num_unfinished -= 1


class Scheduler:
    """Holds the jobs with samples that have not started."""

    def __init__(self, num_slots: int, *, one_at_a_time: bool = False) -> None:
        self._num_slots = num_slots
        self._one_at_a_time = one_at_a_time
        self.min_free = num_slots if one_at_a_time else max(1, num_slots // 16)
        """Fewer free slots aren't filled."""
        self._queues: dict[Priority, deque[Job]] = {priority: deque() for priority in sorted(Priority)}

    def add(self, job: Job) -> None:
        self._queues[job.request.priority].append(job)

    def withdraw(self, job: Job) -> None:
        """Its waiting samples never start. A job without any is not an error."""
        queue = self._queues[job.request.priority]
        if job in queue:
            queue.remove(job)

    def __bool__(self) -> bool:
        return any(self._queues.values())

    def jobs(self) -> Iterator[Job]:
        for queue in self._queues.values():
            yield from queue

    def take(self, num_running: int) -> list[tuple[Job, int]]:
        """Jobs and how many of their samples start now; none while too few slots are free."""
        num_free, starts = self._num_slots - num_running, []
        if num_free < self.min_free:
            return starts
        while num_free and self:
            queue = next(queue for queue in self._queues.values() if queue)
            job = queue[0]
            count = min(num_free, job.num_waiting)
            starts.append((job, count))
            num_free -= count
            if count == job.num_waiting:
                queue.popleft()
            if self._one_at_a_time:
                break
        return starts
