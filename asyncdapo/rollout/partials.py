"""Partials: what running leases have sampled so far, saved with the replay server, and continued from there.

    PartialGroup, two frames  ──unpack──▶  what is sampled of each completion  ──pack──▶  the same, with more tokens

In: the frames of a lease; jobs that run, and the time; those that are recalled. Out: `PartialGroup` messages.
Invariants: a token keeps the log-prob and the version with which it was sampled; a job that was handed back isn't saved
again. Does not own: what is kept and who continues it (the replay server), how an engine says what it has sampled
(`Continuable`), stopping a job (the worker).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np

from asyncdapo.messages import Lease
from asyncdapo.rollout.engine import Sample, Sampled
from asyncdapo.rollout.job import Job
from asyncdapo.transport.codec import Buffer
from asyncdapo.transport.payload import (
    LOGPROB_DTYPE,
    TOKEN_DTYPE,
    PartialCompletion,
    PartialGroup,
    partial_checksum,
    read_partial,
)

Saved = tuple[PartialGroup, Sequence[Buffer]]


def pack(lease_id: int, found: Sequence[Sampled], *, handed_back: bool) -> Saved:
    """The message that saves what is found of the lease's completions, and its frames."""
    completions = [
        PartialCompletion(one.versions, one.finish_reason if isinstance(one, Sample) else None) for one in found
    ]
    frames: tuple[bytes, ...] = ()
    if found:
        token_ids = np.concatenate([one.token_ids for one in found], dtype=TOKEN_DTYPE)
        logprobs = np.concatenate([one.logprobs for one in found], dtype=LOGPROB_DTYPE)
        frames = token_ids.tobytes(), logprobs.tobytes()
    taken = partial_checksum(completions, frames)
    return PartialGroup(lease_id=lease_id, completions=completions, checksum=taken, handed_back=handed_back), frames


def unpack(frames: Sequence[Buffer]) -> list[Sampled]:
    """What the frames of a lease hold of each of its completions; nothing of one that begins anew. Raises Malformed."""
    if not frames:
        return []
    group, buffers = read_partial(frames)
    completions = group.completions
    token_ids, logprobs = np.frombuffer(buffers[0], TOKEN_DTYPE), np.frombuffer(buffers[1], LOGPROB_DTYPE)
    ends = pairwise(accumulate((completion.num_tokens for completion in completions), initial=0))
    found: list[Sampled] = []
    for completion, (begin, end) in zip(completions, ends, strict=True):
        sampled = Sampled(token_ids=token_ids[begin:end], logprobs=logprobs[begin:end], versions=completion.versions)
        reason = completion.finish_reason
        found.append(sampled if reason is None else Sample(**vars(sampled), finish_reason=reason))
    return found


class Saver:
    """Saves what the running leases of a worker have sampled: now and then, and when they are handed back."""

    def __init__(
        self,
        so_far: Callable[[Job], Awaitable[list[Sampled]]],
        every_s: float | None,
        look_s: float,
        tasks: asyncio.TaskGroup,
        take: Callable[[Saved], None],
    ) -> None:
        """`so_far`: see `Rollouts`. `every_s`: `rollout.save_partials_s`. `look_s`: between two calls of `save_due`.
        `take` gets each message."""
        self._so_far, self._every_s, self._look_s, self._tasks, self._take = so_far, every_s, look_s, tasks, take

    def save_due(self, jobs: Iterable[Job], now: float) -> None:
        """Save those of which the next call would come too late: there would be more than `every_s` of sampling."""
        for job in jobs:
            if self._every_s and job.is_being_sampled and now + self._look_s - job.saved_at > self._every_s:
                job.saved_at = now
                self._tasks.create_task(self._save(job, handed_back=False))

    def hand_back(self, jobs: Iterable[Job]) -> None:
        """Save these for the last time. A group that is complete is sent whole."""
        for job in jobs:
            if not (job.scored or job.handed_back):
                job.handed_back = True
                self._tasks.create_task(self._save(job, handed_back=True))

    async def _save(self, job: Job, *, handed_back: bool) -> None:
        assert isinstance(job.source, Lease), "an evaluation isn't saved"
        found = await self._so_far(job)
        if found or handed_back:
            message, frames = pack(job.source.lease_id, found, handed_back=handed_back)
            job.num_told_tokens = max(job.num_told_tokens, message.num_tokens)
            self._take((message, frames))
