"""What people are told of the core: who the next batch is waiting for, and current numbers.

In: the state after an event. Out: a line that starts with one of `WAITS`, which progress lines and the report of a long
wait show, and the gauges of a metrics line. Tests check that whoever is named really has something to do.

Does not own: how long a wait may take (`server.py`, `controller/`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncdapo.replay.core.state import ReplayState

WAITS = ("learner", "rollout", "weights", "no live worker", "run over")
"""`learner`: it trains, or has not asked for its next batch. `rollout`: groups run, or no slot is free. `weights`: a
version is trained but not published, or published but not loaded."""


def gauges(state: ReplayState) -> dict[str, float]:
    """Current numbers, in groups unless the name says otherwise; `run_ahead` in batches."""
    return {
        "run_ahead": state.admission.run_ahead,
        "in_training": state.cut_batches.num_groups,
        "queued": len(state.held.queued),
        "spare": len(state.held.spare),
        "running": len(state.leases.running),
        "keep_rate": state.keep_rate.value,
        "workers": len(state.leases.workers),
        "credits": state.leases.num_credits,
        **({"retired_rows": state.solved.num_retired} if state.solved else {}),
    }


def why_waiting(state: ReplayState) -> str:
    """The party whose next event can bring the next batch nearer."""
    if state.over:
        return "run over"
    batch, in_training = state.next_batch, state.cut_batches.in_training
    if not batch.wanted:
        return _name_training(state) if in_training else f"learner: has not asked for batch {batch.step}"
    leases, size = state.leases, state.config.prompts_per_step
    if leases.running:
        return f"rollout: {len(leases.running)} running, {batch.num_ready} of {size} ready"
    oldest = state.bound.oldest_version(batch.step)
    if in_training and (oldest in in_training or state.stream.next is None or not state.admits()):
        return _name_training(state)
    if not leases.workers:
        return "no live worker"
    if all(worker.loaded_version < oldest for worker in leases.workers.values()):
        return f"weights: no worker has loaded version {oldest}, the oldest that fits batch {batch.step}"
    return f"rollout: no free slot, {batch.num_ready} of {size} ready"


def _name_training(state: ReplayState) -> str:
    step = min(state.cut_batches.in_training)
    if step in state.cut_batches.untrained:
        return f"learner: trains step {step}"
    return f"weights: version {step} is trained and not published"
