"""The health of a process: who it is, what it waits for, and counters that move as long as it makes progress.

It is the answer to a Ray call of the controller. From it the controller updates the roster, builds the chain of waits,
detects stalls and shows how far the next batch is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from asyncdapo.controller.process.roster import Entry
from asyncdapo.controller.process.waits import Wait


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How far the replay server is with the next batch."""

    step: int
    num_ready: int
    """Groups that the batch can count on."""
    num_failed: int
    """Groups on which the reward function raised, in this life of the server."""
    last_failure: str
    """What was raised last."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """One answer of one process."""

    entries: Sequence[Entry]
    """Itself, and the processes that it started."""
    waits: Sequence[Wait]
    progress: Mapping[str, float] = field(default_factory=dict)
    """Counters by name. The process makes progress if any of them moves."""
    filling: Filling | None = None
    """Of the replay server."""
    leaving: str = ""
    """Of a rollout worker: why it should leave; empty if nobody has said so."""
    lost: Sequence[int] = ()
    """Of the replay server: workers that it counts as lost because they were silent for too long."""
