"""Who trains on what: the groups of a batch, dealt to optimizer updates and, in each of them, to the learner's ranks.

In: the headers of a batch, which every rank has. Out: indices into its groups. The replay server sends each rank the
payload of its share by the same function. Invariants: a group with a loss-bearing token is in one update and at one
rank, whole; the same headers give the same shares; which groups an update holds does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncdapo.messages import Group

EVEN_LENGTH = 1 << 15
"""Tokens of a sequence whose attention costs as much as its matrix products: 30k in the shape of Qwen2.5-1.5B, 65k in
that of 7B."""


def deal(groups: Sequence[Group], *, num_updates: int, num_ranks: int) -> list[list[list[int]]]:
    """Indices of groups by update and rank, each list rising.

    An update has consecutive groups, equally many or one more in the first ones; there are fewer updates where fewer
    groups have a loss-bearing token. Inside an update the heaviest group not yet dealt goes to the rank with the least
    work, so a rank may have none.
    """
    trainable = [index for index, group in enumerate(groups) if group.num_loss_tokens]
    size, extra = divmod(len(trainable), num_updates)
    updates, end = [], 0
    for number in range(min(num_updates, len(trainable))):
        start, end = end, end + size + (number < extra)
        updates.append(_by_rank(groups, trainable[start:end], num_ranks))
    return updates


def share_of(dealt: Sequence[Sequence[Sequence[int]]], rank: int) -> list[int]:
    """Of what was dealt, the indices of the groups whose payload the rank needs, rising."""
    return sorted(index for by_rank in dealt for index in by_rank[rank])


def _by_rank(groups: Sequence[Group], indices: Sequence[int], num_ranks: int) -> list[list[int]]:
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for index in sorted(indices, key=lambda index: (-_work(groups[index]), index)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += _work(groups[index])
    return [sorted(share) for share in shares]


def _work(group: Group) -> float:
    """Of the completions that bear loss, in tokens: what is computed, the prompt once, and what attention costs beside
    it, which grows with squared lengths."""
    bearing = (completion for completion in group.completions if any(value for value, _ in completion.loss_mask))
    lengths = [completion.num_tokens for completion in bearing]
    squared = sum((group.num_prompt_tokens + length) ** 2 for length in lengths)
    return group.num_prompt_tokens + sum(lengths) + squared / EVEN_LENGTH
