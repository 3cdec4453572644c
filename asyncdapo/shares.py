"""Batches between the replay server and the learner, and who trains on what of them: groups are dealt to optimizer
updates, their completions to the learner's ranks, each with all of its contexts.

The rules of `messages` hold for the messages here. In: the headers of a batch. Out: a `Deal`, and by it the share of a
rank. The replay server deals a batch once, and every rank receives the same `Batch`, without a token: it reads those of
its share from the segments (`learner/batches/feed`). Invariants: every loss-bearing
completion is at exactly one rank, every other one is at none; the same headers give the same deal; which groups an
update holds depends neither on the number of ranks nor on the model. Does not own: micro-batches, which a rank makes of
its share; denominators, which are made of all headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from msgspec import Struct
from msgspec.structs import replace

from asyncdapo.messages import Context, Group, Message
from asyncdapo.records.record import Place

NOBODY = -1
"""In a `Deal`: at no update, at no rank."""


class CutWanted(Message):
    """learner -> replay. One rank asks for batch `step`. A repeated request gets the same batch."""

    step: int
    rank: int = 0


class Deal(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Who trains on what of a batch."""

    updates: list[int]
    """Optimizer update of each group, from 0; NOBODY for a group without a loss-bearing token."""
    ranks: list[int]
    """Rank of each completion, group after group; NOBODY for one that bears no loss."""

    @property
    def num_updates(self) -> int:
        return max(self.updates, default=NOBODY) + 1


class Batch(Message):
    """replay -> learner: batch `step`, immutable, the same for every rank.

    Sorted by `prompt_id`. `Group.staleness(step)` of each group is at most `max_staleness`.
    """

    step: int
    branch: int
    max_staleness: int
    groups: list[Group]
    """As the learner needs them: without metrics and turns."""
    deal: Deal
    places: list[Place] = []
    """Of each group's record in the segments of the run directory. All of them are on disk."""
    copies: list[int] = []
    """Extra copies of each group in the batch (`filter.mode: replace`); empty if there are none."""


class NoBatch(Message):
    """replay -> learner. The data is used up: there is no batch `step`, and the run ends successfully."""

    step: int
    reason: str
    unreadable: bool = False
    """Batch `step` was cut, but the header of a group is damaged: the run has to roll back to its checkpoint."""


def for_learner(group: Group) -> Group:
    """The group as the learner needs it: without the numbers of the reward function, which may be many, and without
    turns, of which a long episode has many. The header of a batch is limited."""
    completions = [
        replace(
            completion,
            contexts=[replace(context, turns=[]) for context in completion.contexts],
            metrics={},
        )
        for completion in group.completions
    ]
    return replace(group, completions=completions)


# Who trains on what.

STEP = 1.005
"""The limit on the work of a rank grows by this factor until the ranks have room for an update."""


@dataclass(frozen=True)
class Dealer:
    """Deals batches to `num_updates` optimizer updates, and in each of them to `num_ranks` ranks."""

    num_ranks: int = 1
    num_updates: int = 1
    pair_cost: float = 0.0
    """What attention costs for one query and one key, when all else that a token costs is 1: `Shape.pair_cost`."""

    def deal(self, groups: Sequence[Group]) -> Deal:
        """An update has consecutive groups, equally many or one more in the first ones; there are fewer updates where
        fewer groups have a loss-bearing token. In each update the largest work of a rank is close to the mean, and a
        rank may have none."""
        loads = {place: load for place, group in enumerate(groups) if (load := self._load(group)).completions}
        trainable = list(loads)
        size, extra = divmod(len(trainable), self.num_updates)
        updates, ranks = [NOBODY] * len(groups), [[NOBODY] * len(group.completions) for group in groups]
        end = 0
        for number in range(min(self.num_updates, len(trainable))):
            begin, end = end, end + size + (number < extra)
            own = {place: loads[place] for place in trainable[begin:end]}
            for place in own:
                updates[place] = number
            for rank, run in enumerate(_runs(own, self.num_ranks)):
                for place, index in run:
                    ranks[place][index] = rank
        return Deal(updates=updates, ranks=[rank for of_group in ranks for rank in of_group])

    def _load(self, group: Group) -> _Load:
        """The work of its loss-bearing completions. A context attends to itself, and to its prompt if it is rooted."""
        num_prompt = group.num_prompt_tokens
        work = [
            (sum([self._work(context, num_prompt) for context in one.contexts]), index)
            for index, one in enumerate(group.completions)
            if one.num_loss_tokens
        ]
        return _Load(
            num_prompt * (1 + self.pair_cost * num_prompt / 2), sorted(work, key=lambda one: (-one[0], one[1]))
        )

    def _work(self, context: Context, num_prompt: int) -> float:
        num_tokens = context.num_tokens
        return num_tokens * (1 + self.pair_cost * (num_prompt * context.rooted + num_tokens / 2))


@dataclass(frozen=True)
class Piece:
    """What a rank has of one group: its prompt and some of its completions."""

    place: int
    """Of the group in the batch."""
    indices: list[int]
    """Of the completions in the group, rising."""
    header: Group
    """The group's, with these completions only; its payload is read by it."""


def share_of(batch: Batch, rank: int) -> list[Piece]:
    """What this rank trains on, in the order in which its payload is joined. Raises ValueError for a deal of other
    groups."""
    completions = [
        (place, index) for place, group in enumerate(batch.groups) for index in range(len(group.completions))
    ]
    dealt = zip(completions, batch.deal.ranks, strict=True)
    own = groupby((which for which, its_rank in dealt if its_rank == rank), key=lambda which: which[0])
    return [_piece(batch.groups[place], place, [index for _, index in run]) for place, run in own]


def _piece(group: Group, place: int, indices: list[int]) -> Piece:
    return Piece(place, indices, replace(group, completions=[group.completions[index] for index in indices]))


# The deal of one update. A rank that has a part of a group computes the prompt, and reads the group's whole record. So
# groups are cut seldom: the ranks are filled one after the other, up to one limit, and a group is cut where a rank is
# full. What is left over when the last rank is full goes where there is still room.


@dataclass(frozen=True)
class _Load:
    """Work of one group: of its prompt, and of each completion with its index, the largest first. The unit is a token
    whose attention costs nothing."""

    prompt: float
    completions: list[tuple[float, int]]

    @property
    def total(self) -> float:
        return self.prompt + sum(work for work, _ in self.completions)


_Run = list[tuple[int, int]]
"""Completions of one rank: place of the group, index in it."""


def _runs(loads: dict[int, _Load], num_ranks: int) -> list[_Run]:
    """The completions of each rank. No limit below the mean, or below the largest completion, could do."""
    largest_first = sorted(loads.items(), key=lambda item: (-item[1].total, item[0]))
    mean = sum(load.total for load in loads.values()) / num_ranks
    limit = max(mean, *(load.prompt + load.completions[0][0] for load in loads.values()))
    while (runs := _filled(largest_first, limit, num_ranks)) is None:
        limit *= STEP
    return runs


def _filled(loads: Iterable[tuple[int, _Load]], limit: float, num_ranks: int) -> list[_Run] | None:
    """The completions of each rank when none may have more work than the limit; None when they find no room."""
    runs: list[_Run] = [[] for _ in range(num_ranks)]
    rooms = [limit] * num_ranks
    filling = 0
    for place, load in loads:
        left = load.completions
        while left:
            rank = filling if filling < num_ranks else rooms.index(max(rooms))
            taken, left = _fitting(left, rooms[rank] - load.prompt)
            runs[rank] += [(place, index) for _, index in taken]
            if taken:
                rooms[rank] -= load.prompt + sum(work for work, _ in taken)
            elif filling == num_ranks:
                return None
            filling = min(filling + bool(left), num_ranks)
    return runs


def _fitting(
    completions: Iterable[tuple[float, int]], room: float
) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """The largest completions for which there is room, and the others."""
    taken, left = [], []
    for work, index in completions:
        if work <= room:
            taken.append((work, index))
            room -= work
        else:
            left.append((work, index))
    return taken, left
