"""Recovery: what the ledger says of a run, as one record from which the core and the server go on.

In: nothing; these are data. `reload.py` fills a `Recovered` from the tables, at a reload as well as after a rollback:

    reload     the replay server's process is another one, the run is the same: what the ledger holds is in force, open
               leases and live workers included. Credits and the learner's wish for a batch are told again by the peers
    rollback   `rollback.py` has undone what came of weights after a checkpoint: no worker has joined the new branch

`ReplayState(recovered=…)` is then the state that it was, credits and `cut_wanted` apart. A fresh ledger gives
`Recovered()`. Does not own: what a rollback undoes (`rollback`), how the tables are read (`reload`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncdapo.replay.core.batch import HeldGroup
from asyncdapo.replay.core.events import PromptState, StopRun


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLease:
    """A lease that runs."""

    lease_id: int
    prompt_id: int
    worker: int
    session: str
    """The session of the worker that holds it."""
    attempt: int
    started_version: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownWorker:
    """A worker that joined in this branch and was not lost since."""

    session: str
    loaded_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFacts:
    """What the accounts remember of a group until its end."""

    group_id: int
    num_tokens: int
    num_completions: int
    reward_mean: float
    min_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Counts since the start, in the surviving history: what the accounts go on from."""

    tokens: dict[str, int] = field(default_factory=dict)
    """Sampled tokens by the end of their group (`trained filtered expired surplus failed`), and `undone`."""
    completions: dict[str, int] = field(default_factory=dict)
    """Completions, by the same words."""
    groups: dict[str, int] = field(default_factory=dict)
    """Groups, by the same words, and `withdrawn_stale`: leases withdrawn since they would miss the bound."""
    lease_ends: dict[str, int] = field(default_factory=dict)
    """Leases by the kind of their end: `withdrawn lost rejected failed`, and `late` groups."""
    verdicts: int = 0
    """Groups that got a verdict of the filter."""
    gen_batches: int = 0
    """Generation batches that are closed."""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What the ledger says. The defaults are those of a fresh one."""

    branch: int = 0
    branch_step: int = 0
    """Train step that the newest rollback went back to; 0 in branch 0."""
    published: int = 0
    """Newest version that was published in this branch, or that the branch began with."""
    next_step: int = 1
    """The train step whose batch is filled now; every batch before it is trained or in `batches`."""

    num_fresh: int = 0
    """The `prompt_id` of the next fresh prompt."""
    prompts: dict[int, tuple[PromptState, int]] = field(default_factory=dict)
    """State and attempts of every prompt that has a row and no end."""
    places: dict[int, int] = field(default_factory=dict)
    """Place in the stream of every prompt among these that waits; `FIRST` for those in flight at a rollback."""

    queued: list[HeldGroup] = field(default_factory=list)
    """In queue order."""
    spare: list[HeldGroup] = field(default_factory=list)
    batches: dict[int, list[HeldGroup]] = field(default_factory=dict)
    """Members of every batch that is cut and not trained, by rising step, in rising `prompt_id`."""
    copies: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """How many more times each of them stands in the batch, of those that have copies."""
    in_training: dict[int, int] = field(default_factory=dict)
    """Number of groups of every batch, copies among them, that is cut and whose version is not published."""
    facts: dict[int, GroupFacts] = field(default_factory=dict)
    """Of all held groups (`queued`, `spare`, in `batches`), by `group_id`."""

    leases: list[OpenLease] = field(default_factory=list)
    """In rising `lease_id`; none after a rollback."""
    num_leases: int = 0
    """The highest `lease_id` so far, undone ones included: ids are never reused."""
    workers: dict[int, KnownWorker] = field(default_factory=dict)

    verdicts: list[bool] = field(default_factory=list)
    """The latest verdicts, oldest first: was the group kept?"""
    gen_batches: dict[int, int] = field(default_factory=dict)
    """Generation batches that are closed, by the step that they belong to."""
    open_verdicts: list[int] = field(default_factory=list)
    """Verdicts since the last one closed, oldest first: the step in which each fell. A rollback takes the closings of
    later steps back, so that these may be more than one generation batch's worth."""
    limit_reached: bool = False
    """The step being filled has used up its generation batches, and its batch is not cut yet."""

    totals: Totals = field(default_factory=Totals)
    first_lease_at_s: float | None = None
    """When the run granted its first lease (its oldest surviving one, or any that was undone)."""
    over: bool = False
    """No further step: the run was stopped or has ended."""
    stop: StopRun | None = None
    """Why it was stopped, when it was."""
