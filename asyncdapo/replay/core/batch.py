"""The cut: which of the groups that replay holds form the next batch, and what becomes of the others.

In: the kept groups, the spare ones, and the size of a batch. Out: a `Cut`. A cut is made at once and never changed.

Queue order is `(min_version, prompt_id)`: oldest weights first, since they are the next to miss the bound. Members
are then listed by rising `prompt_id`, so that a batch depends on which groups it has and not on when they came.

    cut                the first kept groups; `fill` makes up for missing ones with constant spares
    cut_with_copies    the first verdicts, kept or not; copies of the kept ones stand in the places of the others
    return_behind      at the barrier what stands behind the last one taken goes back to the stream

Does not own: when a batch is cut and by which rule (`queue.py`), and what is too stale to be held at all (`state.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from asyncdapo.messages import sample_seed
from asyncdapo.replay.core.filter import Verdict


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
    copies: tuple[int, ...] = ()
    """How many more times each member stands in the batch; empty when none does."""
    last: int
    """Highest `prompt_id` that has a place in the batch, or whose place a copy has; −1 when there is none."""
    queued: list[HeldGroup]
    """Kept, and waiting for the next batch; in queue order."""
    spare: list[HeldGroup]
    """Not kept, and waiting to give their place in the next batch to a copy; in queue order."""
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
        members=_by_prompt(members),
        last=max((group.prompt_id for group in members), default=-1),
        queued=kept[size:],
        spare=[],
        filtered=[group for group in spare if group.group_id not in taken],
        surplus=[],
    )


def cut_with_copies(step: int, kept: Sequence[HeldGroup], spare: Sequence[HeldGroup], size: int) -> Cut:
    """The first `size` groups in queue order, kept or not, after those that are barren; one of them at least is kept.

    What isn't kept ends `filtered`, and a copy of a member stands in its place. The rest, kept or not, waits for the
    next batch.
    """
    held = sorted([*kept, *spare])
    start = num_barren(kept, spare, size)
    taken = held[start : start + size]
    members = _by_prompt(group for group in taken if group.verdict == "kept")
    rest = held[start + size :]
    return Cut(
        members=members,
        copies=draw_copies(step, [group.prompt_id for group in members], len(taken) - len(members)),
        last=max(group.prompt_id for group in taken),
        queued=[group for group in rest if group.verdict == "kept"],
        spare=[group for group in rest if group.verdict != "kept"],
        filtered=[group for group in held[: start + size] if group.verdict != "kept"],
        surplus=[],
    )


def return_behind(whole: Cut) -> Cut:
    """The cut at the barrier: every prompt after the last one taken goes back to the stream, whatever its verdict.

    The next step then begins right behind it. So the membership of this step and every later one depends neither on
    the order of arrival nor on how many prompts were leased ahead. (A prompt that ended `failed` stays so.)
    """
    return replace(
        whole,
        queued=[],
        spare=[],
        filtered=[group for group in whole.filtered if group.prompt_id <= whole.last],
        surplus=[*whole.queued, *whole.spare, *(group for group in whole.filtered if group.prompt_id > whole.last)],
    )


def num_barren(kept: Sequence[HeldGroup], spare: Sequence[HeldGroup], size: int) -> int:
    """How many groups at the head of the queue are barren: whole batches' worth of verdicts, none of them kept, so that
    there is nothing to copy."""
    if len(spare) < size:
        return 0
    first = min(kept, default=None)
    ahead = len(spare) if first is None else sum(group < first for group in spare)
    return ahead // size * size


def draw_copies(step: int, prompt_ids: Sequence[int], num_copies: int) -> tuple[int, ...]:
    """How many more times each member stands in the batch: every copy is of a member drawn with equal chance.

    Drawn by a hash of the step and the members, so that a batch has the same copies in every process, after a restart
    and after a rollback. Another way of drawing would be another ledger: a batch that is cut is drawn again from it.
    """
    if not num_copies:
        return ()
    seed = sample_seed(step, *prompt_ids)
    drawn = Counter(sample_seed(seed, number) % len(prompt_ids) for number in range(num_copies))
    return tuple(drawn[place] for place in range(len(prompt_ids)))


def _by_prompt(groups: Iterable[HeldGroup]) -> list[HeldGroup]:
    return sorted(groups, key=lambda group: group.prompt_id)
