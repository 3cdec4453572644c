"""Validation of a group: is it what its lease asked for, and can it be trained on?

In: a decoded group with its frames, and the lease that it answers. Out: its payload, or a `BadGroup` that says what is
wrong. A group that passes can't break the core, and can't put NaN into a loss. Does not own: late groups, the filter,
staleness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from asyncdapo.messages import NO_CHECKSUM, Completion, Group
from asyncdapo.replay.core.events import GroupArrived
from asyncdapo.replay.ledger.contexts import header_problem, token_problem
from asyncdapo.replay.server.sessions import HeldLease
from asyncdapo.transport.payload import Payload

MAX_LOGPROB = 1e-3
"""Log-probs are at most 0, except for the rounding of a log-sum-exp."""


class BadGroup(Exception):  # noqa: N818 - a finding about a peer, not a failure of ours
    """A group that contradicts its lease, its own header, or arithmetic."""


def check_group(
    group: Group,
    frames: Sequence[memoryview],
    lease: HeldLease,
    *,
    group_size: int,
    branch: int,
    newest_version: int,
    vocab_size: int | None = None,
) -> Payload:
    """The group's buffers, as views on the frames. Raises BadGroup. `newest_version`: no weights are newer.
    `vocab_size`: token ids are below it; None if it is not known."""
    identity = (group.prompt_id, group.worker, group.attempt, group.branch)
    if identity != (expected := (lease.prompt.prompt_id, lease.worker, lease.attempt, branch)):
        raise BadGroup(f"prompt, worker, attempt and branch are {identity}, its lease says {expected}")
    if len(group.completions) != group_size:
        raise BadGroup(f"{len(group.completions)} completions, rollout.group_size is {group_size}")
    if not math.isfinite(group.generate_s):
        raise BadGroup(f"generate_s is {group.generate_s}")
    for index, completion in enumerate(group.completions):
        if problem := _problem(completion, newest_version):
            raise BadGroup(f"completion {index}: {problem}")
    try:
        payload = Payload.from_frames(frames, [group])
    except ValueError as error:
        raise BadGroup(str(error)) from error
    if problem := token_problem(group, payload):
        raise BadGroup(problem)
    if payload.prompt_ids.tolist() != lease.prompt.token_ids:
        raise BadGroup("its prompt tokens are not those of its lease")
    if payload.token_ids.min() < 0:
        raise BadGroup("a token id is negative")
    if vocab_size is not None and payload.token_ids.max() >= vocab_size:
        raise BadGroup(f"token id {payload.token_ids.max()} is beyond the vocabulary of {vocab_size}")
    if not (np.isfinite(payload.logprobs).all() and payload.logprobs.max() <= MAX_LOGPROB):
        raise BadGroup("a log-prob is above 0 or not finite")
    return payload


def arrival(group: Group) -> GroupArrived:
    """The core's event for a group that passed."""
    shared = set.intersection(*(set(completion.metrics) for completion in group.completions))
    metrics = {name: tuple(completion.metrics[name] for completion in group.completions) for name in sorted(shared)}
    return GroupArrived(
        lease_id=group.lease_id,
        min_version=group.min_version,
        max_version=group.max_version,
        metrics=metrics,
        num_loss_tokens=group.num_loss_tokens,
    )


def _problem(completion: Completion, newest_version: int) -> str | None:
    if problem := header_problem(completion):
        return problem
    for context in completion.contexts:
        if not all(0 <= version <= newest_version for version, _ in context.versions):
            return f"versions {context.versions}, the newest weights are version {newest_version}"
        if any(turn.checksum == NO_CHECKSUM for turn in context.turns):
            return "a turn has no checksum"
    if not all(math.isfinite(number) for number in (completion.reward, *completion.metrics.values())):
        return "its reward or a metric is not finite"
    return None
