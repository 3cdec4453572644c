"""The variants that the bench compares, by name.

    ours        the learner of a run; `ours+bfloat16+compile+full+unshared` changes the named options
    padded      the plain padded Hugging Face step; `padded+bfloat16`
    trl         TRL's step, one for each number of sequences a forward pass that is worth trying
    all         ours in every dtype, compiled or not, with every checkpointing, prompts shared or not; padded; trl

Pure; no torch here. Does not own: how a variant is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from asyncdapo.errors import ConfigError

KEY = "--variants"
DEFAULT = "ours,padded,trl"
DTYPES = ("float32", "bfloat16")
CHECKPOINTING = ("none", "selective", "full")
CHANGES: dict[str, dict[str, object]] = {
    **{dtype: {"dtype": dtype} for dtype in DTYPES},
    "compile": {"compile": True},
    "eager": {"compile": False},
    "checkpointing-none": {"checkpointing": "none"},
    "selective": {"checkpointing": "selective"},
    "full": {"checkpointing": "full"},
    "shared": {"shared": True},
    "unshared": {"shared": False},
}
"""What may follow a plus sign, and what it changes."""
TRL_PASSES = (1, 4, 8)
"""TRL is given the whole batch a forward pass, a quarter and an eighth; its best counts."""


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    kind: str
    """`ours`, `padded` or `trl`."""
    dtype: str
    compile: bool = False
    checkpointing: str = "none"
    shared: bool = True
    """Whether a group's prompt is computed once for its responses."""
    micro_batch: int = 0
    """TRL's: sequences a forward pass."""


def parse_variants(names: str, base: Variant, num_sequences: int) -> list[Variant]:
    """The variants of a list with commas; what a name leaves open is as in `base`. Raises ConfigError for a name that
    isn't known."""
    if names == "all":
        names = ",".join([*map("+".join, product(["ours"], *_all_changes())), "padded", "trl"])
    found: list[Variant] = []
    for name in names.split(","):
        kind, *changes = name.strip().split("+")
        found += _of_kind(name.strip(), kind, changes, base, num_sequences)
    if twice := {variant.name for variant in found if found.count(variant) > 1}:
        raise ConfigError(KEY, "stands there twice", min(twice))
    return found


def _all_changes() -> list[Sequence[str]]:
    return [DTYPES, ("eager", "compile"), ("checkpointing-none", "selective", "full"), ("shared", "unshared")]


def _of_kind(name: str, kind: str, changes: Sequence[str], base: Variant, num_sequences: int) -> list[Variant]:
    known = {"ours": tuple(CHANGES), "padded": DTYPES, "trl": DTYPES}
    if kind not in known:
        raise ConfigError(KEY, "is unknown", name, f"use all, or a list of {', '.join(known)}")
    for change in changes:
        if change not in known[kind]:
            raise ConfigError(KEY, f"{kind} has no {change!r}", name, f"it has {', '.join(known[kind])}")
    variant = replace(base, name=name, kind=kind)
    for change in changes:
        variant = replace(variant, **CHANGES[change])
    if kind != "trl":
        return [variant]
    sizes = sorted({num_sequences // passes for passes in TRL_PASSES if num_sequences % passes == 0}, reverse=True)
    return [replace(variant, name=f"{name}, {size} a pass", micro_batch=size) for size in sizes]
