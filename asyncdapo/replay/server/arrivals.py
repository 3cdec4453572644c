"""What comes in for a lease: a group, its failure, or what is sampled of it so far. Is it what the lease asked for, and
can it be trained on?

In: decoded messages with their frames, and the leases that they answer. Out: an event for the core, with the payload of
a group; or the message is dropped and counted. A group that passes can't break the core, and can't put NaN into a loss.
A late group is acknowledged and dropped, and so is a repeated one, whose acknowledgement was lost. Does not own: the
filter, staleness.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from asyncdapo.messages import NO_CHECKSUM, Ack, Group, GroupFailed, Reject, Withdraw
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.stream import AnswerLengths
from asyncdapo.replay.ledger.contexts import header_problem, token_problem
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.server.dispatch import Dispatch
from asyncdapo.replay.server.sessions import HeldLease, Session, Sessions
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.transport.payload import LOGPROB_DTYPE, TOKEN_DTYPE, PartialGroup, Payload

DROPPED = ("strangers", "malformed", "rejected", "duplicates")
LARGEST_TOKEN = np.iinfo(np.int32).max
MAX_LOGPROB = 1e-3
"""Log-probs are at most 0, except for the rounding of a log-sum-exp."""


log = logging.getLogger("replay")


class BadGroup(Exception):  # noqa: N818 - a finding about a peer, not a failure of ours
    """A group that contradicts its lease, its own header, or arithmetic."""


class Arrivals:
    """Of all workers."""

    def __init__(
        self,
        settings: ServerSettings,
        dispatch: Dispatch,
        sessions: Sessions,
        journal: Journal,
        lengths: AnswerLengths | None,
    ) -> None:
        self._settings, self._dispatch, self._sessions = settings, dispatch, sessions
        self._journal, self._lengths = journal, lengths
        self.dropped = Counter({what: int(settings.totals.get(f"replay/{what}", 0)) for what in DROPPED})
        """Messages that led to nothing, by the `replay/` metric that counts them."""

    def take_group(self, session: Session, group: Group, frames: Sequence[memoryview]) -> None:
        """A complete group, whose lease may be over."""
        lease = self._sessions.leases.get(group.lease_id)
        if lease is None:
            self._settle_late(session, group.lease_id)
            return
        dispatch = self._dispatch
        try:
            if lease.worker != session.worker:
                raise BadGroup(f"the lease is worker {lease.worker}'s")
            payload = check_group(
                group,
                frames,
                lease,
                group_size=self._settings.group_size,
                branch=dispatch.branch,
                newest_version=dispatch.newest_version,
                vocab_size=self._settings.vocab_size,
            )
        except BadGroup as problem:
            self._reject(session, group.lease_id, str(problem))
            return
        self._sessions.note_answer(session, group.num_sampled_tokens - lease.num_tokens)
        if self._lengths:
            self._lengths.note(lease.prompt, group)
        dispatch.apply(arrival(group), arrived=(group, payload))

    def take_failure(self, session: Session, failure: GroupFailed) -> None:
        """The reward function raised on a group."""
        if failure.lease_id not in self._sessions.leases:
            self._settle_late(session, failure.lease_id)
        elif self._sessions.holds(session, failure.lease_id):
            self._dispatch.apply(core.LeaseFailed(lease_id=failure.lease_id), detail=failure.reason)
        else:
            self._reject(session, failure.lease_id, "the lease is another worker's")

    def take_partial(self, session: Session, group: PartialGroup, frames: Sequence[memoryview]) -> None:
        """What is sampled of a lease so far. If it can't be used, what was saved before stays."""
        dispatch, lease_id = self._dispatch, group.lease_id
        if not self._sessions.holds(session, lease_id):
            dispatch.send(session, Withdraw(lease_ids=[lease_id]))
            return
        lease = self._sessions.leases[lease_id]
        if problem := _partial_problem(group, frames, self._settings, dispatch.newest_version):
            self.drop("rejected", session, f"what is saved of lease {lease_id}: {problem}")
        elif num_tokens := group.num_tokens:
            self._sessions.note_answer(session, max(0, num_tokens - lease.num_tokens))
            lease.num_tokens = max(lease.num_tokens, num_tokens)
            versions = group.token_versions
            partial = core.Partial(min_version=min(versions), max_version=max(versions), num_tokens=num_tokens)
            saved = (msgspec.msgpack.encode(group), *frames)
            dispatch.apply(core.PartialSaved(lease_id=lease_id, partial=partial), saved=saved)
        if group.handed_back:
            dispatch.apply(core.LeaseHandedBack(lease_id=lease_id))

    def _settle_late(self, session: Session, lease_id: int) -> None:
        """A group whose lease is over is a repeat (its acknowledgement was lost), or late, or belongs to no lease at
        all."""
        try:
            outcome = self._journal.outcome(lease_id)
        except LookupError as error:
            self._reject(session, lease_id, str(error))
            return
        if outcome == "done":
            self.dropped["duplicates"] += 1
        else:
            late = core.GroupArrived(lease_id=lease_id, min_version=0, max_version=0, metrics={}, num_loss_tokens=0)
            self._dispatch.apply(late)
        self._dispatch.send(session, Ack(lease_id=lease_id))

    def _reject(self, session: Session, lease_id: int, reason: str) -> None:
        """The worker forgets the group. Its lease is over if this worker holds it."""
        self.drop("rejected", session, f"group of lease {lease_id}: {reason}")
        if self._sessions.holds(session, lease_id):
            self._dispatch.apply(core.LeaseLost(lease_id=lease_id, reason="rejected"), detail=reason)
        else:
            self._dispatch.send(session, Reject(lease_id=lease_id, reason=reason))

    def drop(self, what: str, session: Session, problem: str) -> None:
        """A message of this worker led to nothing."""
        self.dropped[what] += 1
        log.warning("worker %d: %s", session.worker, problem)


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
    if problem := _header_problem(group, newest_version):
        raise BadGroup(problem)
    try:
        payload = Payload.from_frames(frames, [group])
    except ValueError as error:
        raise BadGroup(str(error)) from error
    if problem := token_problem(group, payload):
        raise BadGroup(problem)
    if payload.prompt_ids.tolist() != lease.prompt.token_ids:
        raise BadGroup("its prompt tokens are not those of its lease")
    for token_ids in (payload.token_ids, *([payload.support.token_ids] if payload.support else [])):
        largest = token_ids.view(np.uint32).max(initial=0)  # a negative one is larger than any other
        if largest > LARGEST_TOKEN:
            raise BadGroup("a token id is negative")
        if vocab_size is not None and largest >= vocab_size:
            raise BadGroup(f"token id {largest} is beyond the vocabulary of {vocab_size}")
    if not (payload.logprobs.min() > -math.inf and payload.logprobs.max() <= MAX_LOGPROB):  # both are NaN if one is
        raise BadGroup("a log-prob is above 0 or not finite")
    return payload


def _partial_problem(
    group: PartialGroup, frames: Sequence[memoryview], settings: ServerSettings, newest_version: int
) -> str | None:
    """What is wrong with it; None if another worker can continue behind its tokens."""
    if problem := group.problem_with(frames):
        return problem
    if not group.completions:
        return None
    if len(group.completions) != settings.group_size:
        return f"{len(group.completions)} completions, rollout.group_size is {settings.group_size}"
    runs = [run for completion in group.completions for run in completion.versions]
    if not all(0 <= version <= newest_version and count > 0 for version, count in runs):
        return f"versions {runs}, the newest weights are version {newest_version}"
    if any(completion.finish_reason and not completion.versions for completion in group.completions):
        return "a complete response without a token"
    token_ids, logprobs = np.frombuffer(frames[0], TOKEN_DTYPE), np.frombuffer(frames[1], LOGPROB_DTYPE)
    if not ((token_ids >= 0) & (token_ids < (settings.vocab_size or math.inf))).all():
        return "a token id is beyond the vocabulary"
    if not (np.isfinite(logprobs) & (logprobs <= MAX_LOGPROB)).all():
        return "a log-prob is above 0 or not finite"
    return None


def arrival(group: Group) -> core.GroupArrived:
    """The core's event for a group that passed."""
    num = len(group.completions)
    return core.GroupArrived(
        lease_id=group.lease_id,
        min_version=group.min_version,
        max_version=group.max_version,
        metrics={name: numbers for name, numbers in group.metrics.items() if len(numbers) == num},
        num_loss_tokens=group.num_loss_tokens,
    )


def _header_problem(group: Group, newest_version: int) -> str | None:
    """What is wrong with the header, whatever its lease is."""
    for index, completion in enumerate(group.completions):
        if problem := header_problem(completion):
            return f"completion {index}: {problem}"
    if not 0 <= group.min_version <= group.max_version <= newest_version:
        return f"versions {group.min_version} to {group.max_version}, the newest weights are version {newest_version}"
    if NO_CHECKSUM in [turn.checksum for context in group.contexts for turn in context.turns]:
        return "a turn has no checksum"
    rewards = [completion.reward for completion in group.completions]
    for name, numbers in (("reward", rewards), *group.metrics.items()):
        if not all(map(math.isfinite, numbers)):
            return f"the {name} of a completion is not finite: {numbers}"
    return None
