"""The cut: which held groups form the next batch, what happens to the others, and which batches are cut.

In: the kept groups, the spare ones, and the size of a batch. Out: a `Cut`. A cut is made at once and never changes.

Queue order is `(min_version, prompt_id)`: oldest weights first, since they are the next to miss the bound. Members
are then listed by rising `prompt_id`, so that a batch depends on its groups and not on their order of arrival.

    cut                the first kept groups; `fill` adds constant spares if there are too few
    cut_with_copies    the first groups, kept or not; copies of the kept ones replace the others
    return_behind      at the barrier: prompts after the last group taken go back to the stream

Does not own: when a batch is cut, what is too stale for it, and the rule of the cut (`queue.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from asyncdapo.replay.core.filter import Verdict
from asyncdapo.seeds import sample_seed


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class HeldGroup:
    """A complete group without an end yet: queued, spare or cut. Sorts in queue order."""

    min_version: int
    prompt_id: int
    group_id: int
    verdict: Verdict = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What happens to each held group when a batch is cut."""

    members: list[HeldGroup]
    """In rising `prompt_id`."""
    copies: tuple[int, ...] = ()
    """Extra copies of each member in the batch; empty if there are none."""
    last: int
    """Highest `prompt_id` in the batch, groups replaced by a copy included; −1 if there is none."""
    queued: list[HeldGroup]
    """Kept; they wait for the next batch, in queue order."""
    spare: list[HeldGroup]
    """Not kept; in the next batch a copy may replace them. In queue order."""
    filtered: list[HeldGroup]
    surplus: list[HeldGroup]
    """Dropped without an end; their prompts go back to the stream (only at the barrier)."""


class CutBatches:
    """Batches that are cut, until their version is published."""

    def __init__(
        self,
        untrained: Mapping[int, list[HeldGroup]],
        copies: Mapping[int, tuple[int, ...]],
        in_training: Mapping[int, int],
    ) -> None:
        self.untrained = dict(untrained)
        """Members of each batch that isn't trained."""
        self.copies = dict(copies)
        """Extra copies of each member, for the untrained batches that have copies."""
        self.in_training = dict(in_training)
        """Groups, copies included, of each batch whose version isn't published."""

    @property
    def num_groups(self) -> int:
        """Copies included."""
        return sum(self.in_training.values())

    def add(self, step: int, members: list[HeldGroup], copies: tuple[int, ...]) -> None:
        """The batch of a step is cut."""
        self.untrained[step], self.in_training[step] = members, len(members) + sum(copies)
        if copies:
            self.copies[step] = copies

    def train(self, step: int) -> list[HeldGroup]:
        """The batch is trained. Returns its members."""
        self.copies.pop(step, None)
        return self.untrained.pop(step)

    def publish(self, version: int) -> None:
        """Weights are published that have trained on all batches up to `version`."""
        self.in_training = {step: size for step, size in self.in_training.items() if step > version}

    def take_all(self) -> dict[int, list[HeldGroup]]:
        """The run is over: forget the untrained batches. Returns their members."""
        untrained, self.untrained, self.copies = self.untrained, {}, {}
        return untrained


def cut(kept: Sequence[HeldGroup], spare: Sequence[HeldGroup], size: int, *, fill: bool) -> Cut:
    """The first `size` kept groups in queue order; the rest waits for the next batch.

    If there are too few, `fill` adds constant spares (never masked ones). All other spares end `filtered`.
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
    """The first `size` groups in queue order, kept or not, after the barren ones. At least one of them is kept.

    Each group that isn't kept ends `filtered`, and a copy of a member replaces it. The rest, kept or not, waits for the
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
    """The cut at the barrier: every prompt after the last group taken goes back to the stream, whatever its verdict.

    The next step then begins right after it. So the members of this step and of every later one depend neither on the
    order of arrival nor on how many prompts were leased ahead. (A prompt that ended `failed` stays `failed`.)
    """
    return replace(
        whole,
        queued=[],
        spare=[],
        filtered=[group for group in whole.filtered if group.prompt_id <= whole.last],
        surplus=[*whole.queued, *whole.spare, *(group for group in whole.filtered if group.prompt_id > whole.last)],
    )


def num_barren(kept: Sequence[HeldGroup], spare: Sequence[HeldGroup], size: int) -> int:
    """How many groups at the head of the queue are barren: whole batches' worth of groups of which none is kept, so
    that there is nothing to copy."""
    if len(spare) < size:
        return 0
    first = min(kept, default=None)
    ahead = len(spare) if first is None else sum(group < first for group in spare)
    return ahead // size * size


def draw_copies(step: int, prompt_ids: Sequence[int], num_copies: int) -> tuple[int, ...]:
    """Extra copies of each member in the batch: each copy is of a member drawn with equal probability.

    The draw is a hash of the step and the members, so that a batch has the same copies in every process, after a
    restart and after a rollback. Don't change it: batches in existing ledgers are drawn again with it.
    """
    if not num_copies:
        return ()
    seed = sample_seed(step, *prompt_ids)
    drawn = Counter(sample_seed(seed, number) % len(prompt_ids) for number in range(num_copies))
    return tuple(drawn[place] for place in range(len(prompt_ids)))


def _by_prompt(groups: Iterable[HeldGroup]) -> list[HeldGroup]:
    return sorted(groups, key=lambda group: group.prompt_id)
