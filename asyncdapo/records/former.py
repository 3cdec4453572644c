"""Headers of groups as earlier versions wrote them, read as those of today.

In: the msgpack header of a record from before completions had contexts. Out: its `Group`, in which each completion is
one rooted context, all of it sampled in one turn. The buffers of such a record are those of today.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from asyncdapo.messages import NO_CHECKSUM, Completion, Context, FinishReason, Group, Runs


class _FormerCompletion(Struct):
    finish_reason: FinishReason
    versions: Runs
    loss_mask: Runs
    reward: float
    metrics: dict[str, float]

    @property
    def as_today(self) -> Completion:
        return Completion(
            contexts=[Context.of_turn(self.versions, self.loss_mask, NO_CHECKSUM)],
            finish_reason=self.finish_reason,
            reward=self.reward,
            metrics=self.metrics,
        )


_decoder = msgspec.msgpack.Decoder(dict[str, Any])


def former_group(header: bytes) -> Group:
    """Raises msgspec.DecodeError for what is no header."""
    fields = _decoder.decode(header)
    former = msgspec.convert(fields.pop("completions", None), list[_FormerCompletion])
    return msgspec.convert(fields | {"completions": [one.as_today for one in former]}, Group)
