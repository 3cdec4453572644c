"""What surrounds the buckets of a transfer: the header before them, the verdicts after header and trailer.

    learner      header            buckets …   trailer = checksum
    receivers            verdict                                  verdict

A verdict is one number per rank, and every rank gets all of them. So a transfer succeeds for every rank or for none
(only a rank that dies within the last exchange leaves the others in doubt), and a refusal leaves the group in step:
it can be used again. In: a sender's promises. Out: WeightsError that names the ranks which refuse, and why.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import IntEnum

import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.process_group import Deadline
from asyncdapo.weights.group import WeightGroup

MAGIC = 0x41444150_57474854
"""First word of a header: `ADAPWGHT` in ASCII."""
NUM_WORDS = 6
"""Length of a header in int64 words."""


class Verdict(IntEnum):
    """What a rank thinks of a transfer so far."""

    GOOD = 0
    NO_HEADER = 1
    OTHER_BRANCH = 2
    OTHER_VERSION = 3
    OTHER_MANIFEST = 4
    CHANGED = 5


REASONS = {
    Verdict.NO_HEADER: "what arrived is no header",
    Verdict.OTHER_BRANCH: "expects another branch",
    Verdict.OTHER_VERSION: "expects another version",
    Verdict.OTHER_MANIFEST: "has a manifest of other tensors",
    Verdict.CHANGED: "the weights arrived changed (checksum)",
}


@dataclass(frozen=True)
class Header:
    """Announces one transfer; every field is an int64 word after `MAGIC`."""

    branch: int
    version: int
    manifest_digest: int
    stream_bytes: int
    bucket_bytes: int

    def encode(self) -> torch.Tensor:
        """int64 [NUM_WORDS]."""
        return torch.tensor([MAGIC, *astuple(self)], dtype=torch.int64)

    @staticmethod
    def decode(words: list[int]) -> Header | None:
        """None when the words are no header."""
        return Header(*words[1:]) if words[0] == MAGIC else None


def settle(group: WeightGroup, verdict: Verdict, deadline: Deadline) -> None:
    """Tell every rank this verdict. Returns if all are good, else raises WeightsError, at every rank alike."""
    verdicts = group.exchange(verdict, deadline)
    refusals = [f"rank {rank} {REASONS[Verdict(word)]}" for rank, word in enumerate(verdicts) if word != Verdict.GOOD]
    if refusals:
        raise WeightsError(f"transfer of weights refused: {', '.join(refusals)}")
