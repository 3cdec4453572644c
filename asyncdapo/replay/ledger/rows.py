"""A finished group as a row of `groups`: what the ledger says of it beside its payload.

In: the group's header, the action that gave it its first state, where its payload is. Out: values by column. Does not
own: writing (`journal`), the columns' meaning (docs/ledger.md).
"""

from __future__ import annotations

from asyncdapo.messages import Group
from asyncdapo.replay.core.events import MoveGroup
from asyncdapo.replay.ledger.payloads import Place


def group_row(
    action: MoveGroup, group: Group, place: Place | None, *, position: int, now_s: float
) -> dict[str, str | int | float | None]:
    """The row of a group that arrives in transaction `position`. `place` is None when its payload isn't kept."""
    completions = group.completions
    accs = [completion.metrics["acc"] for completion in completions if "acc" in completion.metrics]
    return {
        "group_id": action.group_id,
        "prompt_id": action.prompt_id,
        "lease_id": group.lease_id,
        "branch": group.branch,
        "attempt": group.attempt,
        "worker": group.worker,
        "min_version": group.min_version,
        "max_version": group.max_version,
        "verdict": action.verdict,
        "entered": action.state,
        "state": action.state,
        "step": action.step,
        "reason": action.reason,
        "completions": len(completions),
        "tokens": group.num_tokens,
        "truncated": sum(completion.finish_reason == "length" for completion in completions),
        "reward_mean": sum(completion.reward for completion in completions) / len(completions),
        "acc_mean": sum(accs) / len(accs) if accs else None,
        "generate_s": group.generate_s,
        "segment": place.segment if place else None,
        "offset": place.offset if place else None,
        "bytes": place.num_bytes if place else None,
        "arrived_pos": position,
        "changed_pos": position,
        "arrived_at_s": now_s,
    }
