"""The use of GPUs: a peer's GPU counts in, our workers, ranks, shards and placement out.

Here a learner rank has one GPU, and an engine shares a GPU only if it needs a single one. If the peer's learner shares
GPUs with larger engines, each gets half of them here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

from asyncdapo.convert.rules import Left, Made, Rule, plain, whole

ALL_RANKS = -1
"""As the number of shards."""


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """GPUs of one training run."""

    total: int
    """GPUs of the learner, including those of the engines unless `engines` is set."""
    parallel: int
    """GPUs of one engine."""
    together: bool
    """Whether learner and engines share each GPU."""
    engines: int | Left | None = None
    """Number of engines on GPUs of their own."""

    @property
    def shared(self) -> bool:
        """Whether they can share here too."""
        return self.together and self.parallel == 1


Read = Callable[..., Gpus | None]
"""Called with the values of the keys that tell GPUs. None if they don't tell how many there are."""


def rules(keys: tuple[str, ...], read: Read) -> tuple[Rule, ...]:
    """The rules for workers, ranks and placement."""

    def made(answer: Callable[[Gpus], Any]) -> Callable[..., Any]:
        def value(*values: Any) -> Any:
            gpus = read(*values)
            return None if gpus is None else answer(gpus)

        return value

    return (
        Rule("rollout.num_workers", keys, made(workers)),
        Rule("learner.ranks", keys, made(ranks)),
        Rule("controller.placement", keys, made(placement)),
    )


def shards_rule(
    sharded: tuple[str, ...], keys: tuple[str, ...], read: Read, num_shards: Callable[..., Any] = whole
) -> Rule:
    """The rule for the number of ranks that divide the weights. `num_shards` is called with the values of `sharded`, of
    which the first is given; it returns a number, ALL_RANKS, or `Left`. Here there may be fewer ranks than there."""

    def value(*values: Any) -> Any:
        if values[0] is None:
            return None
        asked, gpus = num_shards(*values[: len(sharded)]), read(*values[len(sharded) :])
        if isinstance(asked, Left):
            return asked
        num_ranks = plain(ranks(gpus)) if gpus else None
        if num_ranks is None:
            return Left("the number of ranks isn't known: learner.shards is auto")
        if asked < 1:
            return Made(num_ranks, "all ranks, as there")
        fitting = gcd(asked, num_ranks)
        return fitting if fitting == asked else Made(fitting, f"{asked} there; it divides {num_ranks} ranks here")

    return Rule("learner.shards", (*sharded, *keys), value)


def number_of(nodes: Any, each: Any) -> int:
    """Number of GPUs of all nodes."""
    return whole(1 if nodes is None else nodes) * whole(1 if each is None else each)


def workers(gpus: Gpus) -> Any:
    """Number of rollout workers."""
    if gpus.engines is not None:
        return gpus.engines
    if gpus.shared:
        return Made(max(1, gpus.total), f"one on each of {gpus.total} GPUs" if gpus.total > 1 else "")
    why = f"on half of {gpus.total} GPUs, which engines and learner share there"
    return Made(_engines_of_half(gpus), why if gpus.together else f"on half of {gpus.total} GPUs")


def ranks(gpus: Gpus) -> Any:
    """Number of learner ranks."""
    if gpus.engines is not None:
        return gpus.total
    if gpus.shared:
        return Made(max(1, gpus.total), "each on a GPU with a worker")
    left = gpus.total - _engines_of_half(gpus) * gpus.parallel
    return Made(max(1, left), f"what the engines leave of {gpus.total} GPUs" if gpus.total > 1 else "")


def placement(gpus: Gpus) -> Any:
    """Whether learner and engines share GPUs."""
    if gpus.shared:
        return "shared"
    return Made("separate", "an engine on several GPUs shares none here" if gpus.together else "")


def _engines_of_half(gpus: Gpus) -> int:
    return max(1, gpus.total // 2 // gpus.parallel)
