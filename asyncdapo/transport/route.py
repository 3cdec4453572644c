"""Routes: by which ranks a bucket comes from rank 0 to every other. Imports no torch.

In: the host of each rank. Out: for each rank, whom it hears of a bucket and whom it tells.

    host a                        host b                        host c
    rank 0 ─────── network ─────▶ rank 2 ─────── network ─────▶ rank 5
      └─ memory ─▶ rank 1           ├─ memory ─▶ rank 3
                                    └─ memory ─▶ rank 4

The first rank of each host leads it. Leaders form a chain, so each host sends the weights once and receives them once,
however many hosts there are. Buckets follow one another, so a chain of H hosts takes the time of H buckets longer than
a single link, and no more.

Invariants: every rank but 0 hears each bucket from one rank; bytes enter a host once, and leave it at most once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """One rank's place on the way of a bucket."""

    source: int | None
    """Whom it hears of a bucket; None at rank 0."""
    leads: bool
    """Whether it is the first of its host. Its bytes then come over the network; those of other ranks are in memory of
    their leader."""
    next: int | None
    """The leader to which it sends the bytes over the network; None if there is none after it."""
    readers: tuple[int, ...]
    """The other ranks of its host, if it leads it."""


def route_of(rank: int, hosts: Sequence[Hashable]) -> Route:
    """The route of this rank; `hosts` has the host of each."""
    leaders = list({host: hosts.index(host) for host in hosts}.values())
    leader = hosts.index(hosts[rank])
    if rank != leader:
        return Route(source=leader, leads=False, next=None, readers=())
    place = leaders.index(rank)
    return Route(
        source=leaders[place - 1] if place else None,
        leads=True,
        next=leaders[place + 1] if place + 1 < len(leaders) else None,
        readers=tuple(other for other, host in enumerate(hosts) if host == hosts[rank] and other != rank),
    )
