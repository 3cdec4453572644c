"""What the pure core of replay is told (events) and what it wants done (actions).

`ReplayState.handle(event) -> list[Action]` is the only way in and out: no I/O, no clock, no threads. The replay server
translates messages and Ray calls into events, writes all actions of one event to the journal in one transaction, and
only then sends what is to be sent. The property tests drive the same class.

A group has no id of its own: a lease yields at most one group, so `group_id == lease_id` everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncdapo.replay.core.filter import Verdict

PromptState = Literal[
    "waiting", "leased", "queued", "spare", "cut", "trained", "filtered", "expired", "failed", "unused"
]
GroupState = Literal["queued", "spare", "cut", "trained", "filtered", "expired", "surplus", "failed"]
VERDICT_STATES: tuple[GroupState, ...] = ("queued", "spare", "filtered")
"""States that a group enters with its verdict; `queued` means kept. One that was stale when it came enters none."""
LEASE_ENDS = ("late", "withdrawn", "lost", "rejected", "failed")
"""Ends of a lease without a group of the ledger, as `EndLease` explains them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerJoined(Event):
    """A worker's session began. Leases that its former session held are lost (the server sends `WorkerLost` first)."""

    worker: int
    loaded_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLost(Event):
    """A worker is gone, and with it every lease that it holds."""

    worker: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready(Event):
    """`credits`: leases the worker can start now, all that were granted before this event already taken off."""

    worker: int
    credits: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingBegan(Event):
    """The lease's first token was sampled with the weights of `version`."""

    lease_id: int
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsLoaded(Event):
    """From now on the worker generates with the weights of `version`."""

    worker: int
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupArrived(Event):
    """A well-formed group arrived (its lease may be over by now: then it is late)."""

    lease_id: int
    min_version: int
    max_version: int
    metrics: dict[str, tuple[float, ...]]
    """Each metric that every completion has, one number per completion."""
    num_loss_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseFailed(Event):
    """The reward function raised: the prompt ends `failed`."""

    lease_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseLost(Event):
    """The lease ended without a group: no progress for `lease_stall_s` ("stalled"), or its group was undecodable
    ("rejected"). Costs an attempt."""

    lease_id: int
    reason: Literal["stalled", "rejected"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CloseGenBatch(Event):
    """The open generation batch ends with the latest verdict, however few it has (the prompts came in one list)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchWanted(Event):
    """The learner waits for batch `step`. Asking for one that was cut already changes nothing."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained(Event):
    """Train step `step` is done and its optimizer updates are applied."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Published(Event):
    """The send of version `version` is over; `in_training` falls."""

    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded(Event):
    """No further step: every prompt without an end becomes `unused`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """Something to be done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrantLease(Action):
    """Send a lease. The move of its prompt to `leased` follows as an action of its own."""

    lease_id: int
    prompt_id: int
    worker: int
    attempt: int
    """1 for the first; surplus and rollback don't count as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MovePrompt(Action):
    """Journal: the prompt is in this state now. `reason` explains an end that has several causes (`masked`, …)."""

    prompt_id: int
    state: PromptState
    attempts: int
    """Leases that ended lost, rejected, or (under `requeue`) withdrawn or expired, so far."""
    step: int | None = None
    """Batch it was cut into, for `cut` and `trained`."""
    reason: str = ""
    place: int | None = None
    """Its place in the stream, for `waiting`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveGroup(Action):
    """Journal: the group is in this state now. The first one of a group follows its `GroupArrived` at once."""

    group_id: int
    prompt_id: int
    state: GroupState
    verdict: Verdict
    step: int | None = None
    """Batch it was cut into: for `cut`, `trained`, and a member that the end of the run made `surplus`."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndLease(Action):
    """The lease is over. Journal row in `events` unless `done`; `withdrawn` is also sent to the worker.

    done       its group was accepted (acknowledge)
    late       a group of a lease that is over: acknowledge and drop it
    withdrawn  the worker shall stop: the lease would miss the staleness bound, or the step needs it no more
    lost, rejected, failed   as the event said
    """

    lease_id: int
    prompt_id: int | None
    worker: int | None
    outcome: Literal["done", "late", "withdrawn", "lost", "rejected", "failed"]
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CutBatch(Action):
    """Batch `step` has these members, in rising `prompt_id`. Journal it, then send it.

    At the limit of generation batches it is cut at once, perhaps before the learner asks for it: then it is sent when
    the learner does. The moves of its prompts and groups to `cut` follow as actions of their own.
    """

    step: int
    group_ids: tuple[int, ...]
    copies: tuple[int, ...] = ()
    """How many more times each member stands in the batch (`filter.mode: replace`); empty when none does."""
    staleness: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenBatchClosed(Action):
    """A generation batch is complete: journal row in `events`, and a count for the metrics."""

    step: int
    """The step it belongs to: in which its first verdict fell."""
    number: int
    """1 for the first of this step."""
    limit_reached: bool
    """It was the last that its step may open, and the step's batch is not full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRun(Action):
    """The run ends. `error` is false when the data is used up, else `reason` is the cause in the last lines."""

    reason: str
    error: bool
