"""Settings of a replay server: what its parts need of the config and of the run so far, in one object.

In: the sections of the config, and the last metrics line of the run. Out: values that never change while the server
lives. Does not own: the settings of the core (`ReplayConfig`, `FilterConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncdapo.replay.config import ReplayConfig
from asyncdapo.shares import Dealer

COLLECT_AFTER = 20_000
"""New objects after which a server looks for garbage. A group is 200. After 700, as Python does, is 5 % of its time."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Made once for each life of the server. Every part takes from it what it needs."""

    replay: ReplayConfig
    group_size: int
    """Completions of a group."""
    seed: int
    """The run's."""
    eval_share: float = 0.5
    """`eval.max_share`."""
    dealer: Dealer = Dealer()
    """Deals every batch to the learner's ranks."""
    max_failure_ratio: float = 1.0
    """`reward.max_failure_ratio`."""
    vocab_size: int | None = None
    """Token ids are below it; None if it is not known."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """The run's last metrics line before this process, empty in a new run. Counts that are not in the ledger resume
    from it."""

    @property
    def stall_ticks(self) -> float:
        """Heartbeat intervals without progress after which a lease is stalled."""
        return self.replay.lease_stall_s / self.replay.heartbeat_s
