"""Configuration of replay: batch size, staleness bound, and what the filter keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from asyncdapo.errors import ConfigError
from asyncdapo.ranges import PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Dynamic sampling: a group whose completions all have the same metric teaches nothing and is dropped."""

    enabled: bool = True
    """Drop zero-variance groups (DAPO §3.2). Without the filter every group is trained on."""
    mode: Literal["filter", "replace"] = "filter"
    """`filter`: sample until the batch is full of groups worth training on. `replace`: take the first
    `replay.prompts_per_step` groups and put copies of those worth training on in the place of the others."""
    metric: str = "acc"
    """Number that is compared within a group: `acc`, `score` (scaled), `seq_reward` or `seq_final_reward` (both with
    the overlong punishment), or any number that your function returns."""
    max_gen_batches: int = 0
    """Generation batches that one train step may open; 0 or less is no limit."""
    gen_batch_multiplier: PositiveInt = 1
    """Verdicts in a generation batch, as a multiple of `replay.prompts_per_step`."""
    on_limit: Literal["raise", "partial", "unfiltered"] = "raise"
    """At that limit: end the run (`raise`), train on the groups kept so far (`partial`), or fill the batch with
    zero-variance groups (`unfiltered`)."""

    @property
    def replaces(self) -> bool:
        """Whether copies take the places of groups that aren't worth training on. Without the filter every group is."""
        return self.enabled and self.mode == "replace"


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The queue between rollout and learner, and the bound on its staleness."""

    prompts_per_step: PositiveInt = 16
    """Groups in one batch, copies included (`filter.mode: replace`). Only `filter.on_limit` can make it fewer."""
    run_ahead: Annotated[float, Meta(ge=0, extra={"fix": "0 is synchronous training"})] | Literal["auto"] = 1.0
    """Batches that generation may be ahead of training. 0 is synchronous; fractions are allowed. `auto`: as few as keep
    the learner from waiting, measured while the run goes on, at most `replay.max_staleness`."""
    max_staleness: Annotated[int, Meta(ge=0, extra={"fix": "0 trains on fresh groups only"})] = 2
    """Most train steps between the weights that sampled a group's oldest token and the weights that train on it."""
    order: Literal["arrival", "longest_first"] = "arrival"
    """Which of the next `prompts_per_step` prompts is sampled first: that of the stream, or the one whose answers were
    the longest in an earlier epoch, so that the longest don't come last."""
    on_stale: Literal["auto", "drop", "requeue", "wait"] = "drop"
    """What happens to a group that would exceed the bound: `drop` it, `requeue` its prompt, or `wait` with the cut of
    the batch until the group is done. `auto` waits, unless few are dropped and the wait costs more than they are
    worth."""
    lease_stall_s: PositiveFloat = 60.0
    """Seconds without a new token after which a lease is lost and its prompt is sampled again. Time in which the lease
    waits for a slot of a working engine, or for the verifier, doesn't count."""
    heartbeat_s: PositiveFloat = 2.0
    """Seconds between a worker's heartbeats. After 5 missed ones the worker is suspected, after 15 it is lost."""
    keep_payloads: bool = False
    """Keep the tokens and log-probs of every group (RUN_DIR/payloads). Otherwise they are deleted after training."""

    def __post_init__(self) -> None:
        if self.run_ahead == "auto" and self.max_staleness == 0:
            problem = "has nothing to choose from: replay.max_staleness is 0"
            raise ConfigError("replay.run_ahead", problem, "auto", "replay.max_staleness=1 or more")
        if self.run_ahead != "auto" and self.run_ahead > self.max_staleness:
            raise ConfigError(
                "replay.run_ahead",
                f"must be at most replay.max_staleness ({self.max_staleness})",
                self.run_ahead,
                "else groups would be sampled only to be dropped",
            )
        if self.synchronous and self.order != "arrival":
            problem = "does nothing with replay.run_ahead 0, where a batch is the first kept of the stream"
            raise ConfigError("replay.order", problem, self.order, "use arrival")
        if self.lease_stall_s < 2 * self.heartbeat_s:
            raise ConfigError(
                "replay.lease_stall_s",
                f"must be at least two heartbeats (replay.heartbeat_s is {self.heartbeat_s:g})",
                self.lease_stall_s,
            )

    @property
    def synchronous(self) -> bool:
        """`run_ahead: 0` is a barrier: nothing is sampled while the learner trains."""
        return self.run_ahead == 0

    @property
    def most_ahead(self) -> float:
        """Batches that generation may ever be ahead."""
        return self.max_staleness if self.run_ahead == "auto" else self.run_ahead

    @property
    def staleness_bound(self) -> int:
        """The bound in force: 0 in synchronous training whatever `max_staleness` says."""
        return 0 if self.synchronous else self.max_staleness
