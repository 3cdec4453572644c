"""The cut: which of the groups that replay holds form the next batch, and what becomes of the others.

In: the kept groups, the spare ones, and the size of a batch. Out: a `Cut`. A cut is made at once and never changed.

Queue order is `(min_version, prompt_id)`: oldest weights first, since they are the next to miss the bound. Members
are then listed by rising `prompt_id`, so that a batch depends on which groups it has and not on when they came.

Does not own: when a batch is cut, and what is too stale to be held at all (`state.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncdapo.replay.filter import Verdict


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class HeldGroup:
    """A finished group that has not ended yet: queued, spare or cut. Sorts in queue order."""

    min_version: int
    prompt_id: int
    group_id: int
    verdict: Verdict = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What becomes of every group held when a batch is cut."""

    members: list[HeldGroup]
    """In rising `prompt_id`."""
    queued: list[HeldGroup]
    """Kept, and waiting for the next batch; in queue order."""
    filtered: list[HeldGroup]
    surplus: list[HeldGroup]
    """Dropped without an end: their prompts go back to the stream (the barrier only)."""


def cut(kept: Sequence[HeldGroup], spare: Sequence[HeldGroup], size: int, *, fill: bool) -> Cut:
    """The first `size` kept groups in queue order; the rest waits for the next batch.

    `fill` makes up for missing ones with constant spares (never with masked ones); the other spares end `filtered`.
    """
    kept, spare = sorted(kept), sorted(spare)
    members = kept[:size]
    if fill:
        constant = [group for group in spare if group.verdict == "constant"]
        members = members + constant[: size - len(members)]
    taken = {group.group_id for group in members}
    return Cut(
        members=sorted(members, key=lambda group: group.prompt_id),
        queued=kept[size:],
        filtered=[group for group in spare if group.group_id not in taken],
        surplus=[],
    )


def cut_at_barrier(kept: Sequence[HeldGroup], spare: Sequence[HeldGroup], size: int, *, fill: bool) -> Cut:
    """As `cut`, and every prompt after the last member goes back to the stream, whatever its verdict.

    The next step then begins right behind the last member. So the membership of this step and every later one depends
    neither on the order of arrival nor on how many prompts were leased ahead. (A prompt that ended `failed` stays so.)
    """
    whole = cut(kept, spare, size, fill=fill)
    last = max((group.prompt_id for group in whole.members), default=-1)
    behind = [group for group in whole.filtered if group.prompt_id > last]
    return Cut(
        members=whole.members,
        queued=[],
        filtered=[group for group in whole.filtered if group.prompt_id < last],
        surplus=whole.queued + behind,
    )
