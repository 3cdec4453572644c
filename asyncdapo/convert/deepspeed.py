"""Sharding by name: the settings of DeepSpeed and FSDP that ms-swift ships, as values of `learner.*`.

In: a name such as `zero3_offload` or `full_shard auto_wrap`. Out: shards, resharding and offload. A file of the user's
is not read. Does not own: how many ranks there are (`gpus`).
"""

from __future__ import annotations

import re
from typing import Any

from asyncdapo.convert import meanings as mean
from asyncdapo.convert.gpus import ALL_RANKS
from asyncdapo.convert.rules import Left, Made, whole

ZERO = re.compile(r"zero([0-3])(_offload)?")
"""DeepSpeed's settings that come with ms-swift, by name."""
OWN_FILE = Left("a file of DeepSpeed's isn't read: learner.shards is auto")


def num_shards(deepspeed: Any, part: Any = None) -> Any:
    """How many ranks divide a copy: all, or those of a ZeRO++ partition; without ZeRO none."""
    if not (found := ZERO.fullmatch(str(deepspeed))):
        return OWN_FILE
    if found[1] == "0":
        return 1
    return ALL_RANKS if part is None else whole(part)


def reshard(deepspeed: Any) -> Any:
    """Their stages 1 and 2 leave weights whole, so that the backward pass gathers none."""
    found = ZERO.fullmatch(str(deepspeed))
    if not found or found[1] == "0":
        return None
    return True if found[1] == "3" else Made(False, f"stage {found[1]} gathers no weights for the backward pass either")


def offload(deepspeed: Any) -> Any:
    found = ZERO.fullmatch(str(deepspeed))
    return mean.offload(bool(found[2])) if found else None


def num_fsdp_shards(how: Any) -> Any:
    """By the names of `transformers`, and their own `fsdp2`."""
    known = how == "fsdp2" or any(name in str(how) for name in ("full_shard", "shard_grad_op"))
    return ALL_RANKS if known else Left("of unknown meaning: learner.shards is auto")
