"""The input of replay's pure core (events) and its output (actions).

`ReplayState.handle(event) -> list[Action]` is the only way in and out: no I/O, no clock, no threads. The replay server
translates messages and Ray calls into events. It writes all actions of one event to the journal in one transaction, and
only then sends messages. The property tests drive the same class.

A group has no id of its own: a lease yields at most one group, so `group_id == lease_id` everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, dataclass_transform

from msgspec import Struct, field

from asyncdapo.replay.core.filter import Verdict

PromptState = Literal[
    "waiting",
    "leased",
    "queued",
    "spare",
    "cut",
    "trained",
    "filtered",
    "expired",
    "failed",
    "retired",
    "unused",
]
GroupState = Literal["queued", "spare", "cut", "trained", "filtered", "expired", "surplus", "failed"]
VERDICT_STATES: tuple[GroupState, ...] = ("queued", "spare", "filtered")
"""States that a group enters with its verdict; `queued` means kept. A group that arrives stale enters none of them."""
LEASE_ENDS = ("late", "withdrawn", "lost", "rejected", "failed")
"""Ends of a lease without a group in the ledger; see `EndLease`."""


class Partial(Struct, frozen=True, kw_only=True):
    """What is sampled of a group that isn't complete: at least one token."""

    min_version: int
    max_version: int
    num_tokens: int


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
class Event(Struct, frozen=True, kw_only=True):
    """Something that happened."""


class WorkerJoined(Event, kw_only=True):
    """A worker's session began. If it had an earlier session, the server sends `WorkerLost` for that first."""

    worker: int
    loaded_version: int
    continues: bool = True
    """Whether it continues what others have sampled in part."""


class WorkerLost(Event, kw_only=True):
    """A worker is gone. Every lease that it held is lost."""

    worker: int


class WorkerDrained(Event, kw_only=True):
    """A worker leaves. It hands back the leases that it still holds, which costs their prompts no attempt."""

    worker: int


class Ready(Event, kw_only=True):
    """`credits`: leases that the worker can start now, beyond all that were granted before this event."""

    worker: int
    credits: int
    pace: float = 1.0
    """How fast it samples a sequence, as a share of the mean of all; 1 if that isn't known."""


class SamplingBegan(Event, kw_only=True):
    """The lease's first token was sampled with the weights of `version`."""

    lease_id: int
    version: int


class WeightsLoaded(Event, kw_only=True):
    """From now on the worker generates with the weights of `version`."""

    worker: int
    version: int


class GroupArrived(Event, kw_only=True):
    """A well-formed group arrived. If its lease is already over, it is late."""

    lease_id: int
    min_version: int
    max_version: int
    metrics: Mapping[str, Sequence[float]]
    """Each metric that every completion has, one number per completion."""
    num_loss_tokens: int


class LeaseFailed(Event, kw_only=True):
    """The reward function raised: the prompt ends `failed`."""

    lease_id: int


class LeaseLost(Event, kw_only=True):
    """The lease ended without a group. It made no progress for `lease_stall_s` ("stalled"), or its group couldn't be
    decoded ("rejected"). Costs an attempt."""

    lease_id: int
    reason: Literal["stalled", "rejected"]


class PartialSaved(Event, kw_only=True):
    """What is sampled of a running lease by now. It replaces what was saved of its prompt before."""

    lease_id: int
    partial: Partial


class PartialUnreadable(Event, kw_only=True):
    """What is saved of the prompt isn't as it was saved. The lease that it was to go to begins anew."""

    prompt_id: int


class LeaseHandedBack(Event, kw_only=True):
    """The worker has stopped the lease. It costs the prompt no attempt."""

    lease_id: int


class CloseGenBatch(Event, kw_only=True):
    """The open generation batch ends with the latest verdict, even if it isn't full (the prompts came in one list)."""


class BatchWanted(Event, kw_only=True):
    """The learner waits for batch `step`. Has no effect if the batch was cut already."""

    step: int


class Trained(Event, kw_only=True):
    """Train step `step` is done and its optimizer updates are applied."""

    step: int


class Published(Event, kw_only=True):
    """The workers have been sent `version`, and `in_training` falls."""

    version: int


class RunEnded(Event, kw_only=True):
    """No step follows: every prompt without an end becomes `unused`."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
class Action(Struct, frozen=True, kw_only=True):
    """Something to do."""


class GrantLease(Action, kw_only=True):
    """Send a lease. A separate action moves its prompt to `leased`."""

    lease_id: int
    prompt_id: int
    worker: int
    attempt: int
    """1 for the first. Surplus and rollback don't count as attempts."""
    num_begun: int = 0
    """Tokens that are saved of its prompt: the worker continues behind them."""


class SavePartial(Action, kw_only=True):
    """Keep what is sampled of the prompt, in place of what was saved before."""

    prompt_id: int
    lease_id: int
    partial: Partial


class DropPartial(Action, kw_only=True):
    """Delete what is saved of the prompt."""

    prompt_id: int
    num_lost: int
    """Tokens that end with it; 0 if they are in the prompt's group, or end with its lease."""
    reason: str


class MovePrompt(Action, kw_only=True):
    """Journal: the prompt is in this state now. `reason` tells apart the causes of an end (`masked`, …)."""

    prompt_id: int
    state: PromptState
    attempts: int
    """Its leases so far that ended lost, rejected, or (under `requeue`) withdrawn or expired."""
    step: int | None = None
    """Batch it was cut into, for `cut` and `trained`."""
    reason: str = ""
    place: int | None = None
    """Its place in the stream, for `waiting`."""


class MoveGroup(Action, kw_only=True):
    """Journal: the group is in this state now. A group's first move is caused by its `GroupArrived`."""

    group_id: int
    prompt_id: int
    state: GroupState
    verdict: Verdict
    step: int | None = None
    """Batch it was cut into: for `cut`, `trained`, and a member that the end of the run made `surplus`."""
    reason: str = ""


class EndLease(Action, kw_only=True):
    """The lease is over. Journal: a row in `events`, except for `done`. `withdrawn` is also sent to the worker.

    done       its group was accepted: acknowledge it
    late       a group arrived for a lease that is over: acknowledge and drop it
    withdrawn  the worker must stop: the lease would miss the staleness bound, the step no longer needs it, the
               worker leaves ("drained"), or has stopped it ("handed back")
    lost, rejected, failed   as the event said
    """

    lease_id: int
    prompt_id: int | None
    worker: int | None
    outcome: Literal["done", "late", "withdrawn", "lost", "rejected", "failed"]
    reason: str = ""
    num_kept: int = 0
    """Of its tokens, those that stay saved for the prompt's next lease."""


class CutBatch(Action, kw_only=True):
    """Batch `step` has these members, in rising `prompt_id`. Journal it, then send it.

    At the limit of generation batches it is cut at once. If the learner hasn't asked for it yet, it is sent when the
    learner does. Separate actions move its prompts and groups to `cut`.
    """

    step: int
    group_ids: tuple[int, ...]
    copies: tuple[int, ...] = ()
    """Extra copies of each member in the batch (`filter.mode: replace`); empty if there are none."""
    staleness: tuple[int, ...]


class GenBatchClosed(Action, kw_only=True):
    """A generation batch is complete. Journal: a row in `events`; the metrics count it."""

    step: int
    """The step that it belongs to: the one of its first verdict."""
    number: int
    """1 for the first of this step."""
    limit_reached: bool
    """It was the last that its step may open, and the step's batch isn't full."""


class PaceMeasured(Action, kw_only=True):
    """What a step said of `run_ahead: auto`. Journal: a row in `events`, from which the next process resumes."""

    step: int
    """Whose weights were published."""
    of_workers: float
    of_learner: float
    """See `Pacing`; groups."""
    run_ahead: float
    """In force from now on."""


class StopRun(Action, kw_only=True):
    """The run ends. `error` is false if the data is used up; otherwise the run's last lines show `reason` as the
    cause."""

    reason: str
    error: bool
