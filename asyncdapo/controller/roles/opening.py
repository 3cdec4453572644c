"""What the replay server is told when it starts, and what it then tells the others.

In: `Start`, from the controller. Out: `Opened`, to the controller, which hands on the addresses. Records only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncdapo.messages import Prompt

NUM_PROBE_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a life of the replay server begins."""

    roll_back_to: int | None = None
    """Train step of the checkpoint from which the run resumes; None keeps the ledger as it is."""
    reason: str = ""
    totals: dict[str, float] = field(default_factory=dict)
    """The last metrics line, from which counts that aren't in the ledger continue."""
    ports: tuple[int, int] = (0, 0)
    """For workers and for the learner; 0 is any."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the others need to know of an open replay server."""

    branch: int
    rollout_address: str
    learner_address: str
    ports: tuple[int, int]
    data_ends: bool
    """Whether the prompts can be used up before the last step."""
    num_left_out: int
    """Rows whose prompt is too long."""
    num_eval_left_out: int
    """Of those for evaluation."""
    unknown: str
    """A line on prompts with text that the tokenizer doesn't know; empty where none has."""
    eval_prompts: list[Prompt]
    eval_texts: list[str]
    """Of these prompts, as the model reads them: special tokens are written out."""
    probe_prompts: list[list[int]]
    """Token ids of the first prompts of the stream, on which engines and learner are compared."""
