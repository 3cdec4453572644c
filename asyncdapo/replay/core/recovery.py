"""Recovery: the ledger's record of a run, from which the core and the server resume.

These are data only. `reload.py` fills a `Recovered` from the tables, after a reload and after a rollback:

    reload     the replay server is a new process of the same run. Everything in the ledger is valid, open leases and
               live workers included. The peers report credits and the wanted batch again
    rollback   `rollback.py` has undone everything after a checkpoint. No worker has joined the new branch yet

`ReplayState(recovered=…)` is then the state as it was, except for credits and `cut_wanted`. A fresh ledger gives
`Recovered()`. Does not own: what a rollback undoes (`rollback`), how the tables are read (`reload`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncdapo.replay.core.batch import HeldGroup
from asyncdapo.replay.core.events import Partial, PromptState, StopRun


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLease:
    """A lease that runs."""

    lease_id: int
    prompt_id: int
    worker: int
    session: str
    """The worker's session."""
    attempt: int
    started_version: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownWorker:
    """A worker that has joined in this branch and hasn't been lost."""

    session: str
    loaded_version: int
    continues: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFacts:
    """What the accounts keep of a group until its end."""

    group_id: int
    num_tokens: int
    """Sampled."""
    num_completions: int
    reward_mean: float
    min_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Counts since the start, without undone history. The accounts resume from them."""

    tokens: dict[str, int] = field(default_factory=dict[str, int])
    """Sampled tokens by the end of their group (`trained filtered expired surplus failed`), `undone`, and `dropped`:
    saved for a group that wasn't continued."""
    completions: dict[str, int] = field(default_factory=dict[str, int])
    """Completions, by the same keys."""
    groups: dict[str, int] = field(default_factory=dict[str, int])
    """Groups, by the same keys, and `withdrawn_stale`: leases withdrawn because they would miss the bound."""
    lease_ends: dict[str, int] = field(default_factory=dict[str, int])
    """Leases by their end (`withdrawn lost rejected failed`), and `late` groups."""
    verdicts: int = 0
    """Groups that got a verdict from the filter."""
    gen_batches: int = 0
    """Closed generation batches."""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The ledger's record. The defaults are those of a fresh ledger."""

    branch: int = 0
    published: int = 0
    """Newest version published in this branch; at first, the one that the branch began with."""
    next_step: int = 1
    """The train step whose batch is being filled. Every batch before it is trained or in `batches`."""

    num_fresh: int = 0
    """The `prompt_id` of the next fresh prompt."""
    prompts: dict[int, tuple[PromptState, int]] = field(default_factory=dict[int, tuple[PromptState, int]])
    """State and attempts of every prompt that has a row but no end."""
    places: dict[int, int] = field(default_factory=dict[int, int])
    """Place in the stream of each of these that waits; `FIRST` for those in flight at a rollback. Also of those before
    `num_fresh` that have no row, since a longer one of their window was leased first."""

    queued: list[HeldGroup] = field(default_factory=list[HeldGroup])
    """In queue order."""
    spare: list[HeldGroup] = field(default_factory=list[HeldGroup])
    batches: dict[int, list[HeldGroup]] = field(default_factory=dict[int, list[HeldGroup]])
    """Members of each batch that is cut but not trained, by rising step, in rising `prompt_id`."""
    copies: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    """Extra copies of each member, for the batches that have copies."""
    in_training: dict[int, int] = field(default_factory=dict[int, int])
    """Groups, copies included, of each batch that is cut but whose version isn't published."""
    facts: dict[int, GroupFacts] = field(default_factory=dict[int, GroupFacts])
    """Facts of all held groups (in `queued`, `spare` and `batches`), by `group_id`."""

    leases: list[OpenLease] = field(default_factory=list[OpenLease])
    """In rising `lease_id`; none after a rollback."""
    num_leases: int = 0
    """The highest `lease_id` so far, undone leases included: ids are never reused."""
    workers: dict[int, KnownWorker] = field(default_factory=dict[int, KnownWorker])
    partials: dict[int, Partial] = field(default_factory=dict[int, Partial])
    """What is saved of groups that aren't complete, by `prompt_id`."""

    measured: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """What `run_ahead: auto` measured in the latest steps, of the workers and of the learner, oldest first."""
    verdicts: list[bool] = field(default_factory=list[bool])
    """The latest verdicts, oldest first: whether each group was kept."""
    gen_batches: dict[int, int] = field(default_factory=dict[int, int])
    """Number of closed generation batches, by the step that they belong to."""
    open_verdicts: list[int] = field(default_factory=list[int])
    """The step of each verdict since the last generation batch closed, oldest first. They may fill more than one, since
    a rollback undoes the closings of later steps."""
    limit_reached: bool = False
    """The step being filled has used up its generation batches, and its batch isn't cut yet."""

    totals: Totals = field(default_factory=Totals)

    @property
    def num_partial_tokens(self) -> int:
        """Saved of prompts that wait."""
        waiting = (partial for prompt_id, partial in self.partials.items() if prompt_id in self.places)
        return sum(partial.num_tokens for partial in waiting)

    first_lease_at_s: float | None = None
    """When the run granted its first lease, undone leases included."""
    over: bool = False
    """No step follows: the run was stopped or has ended."""
    stop: StopRun | None = None
    """Why it was stopped; None if it wasn't."""
