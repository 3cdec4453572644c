"""Samples: completions of a train step for people to read, as a table.

In: a few completions of a batch. Out: rows of a table, whose long texts are cut. Does not own: which completions (the
replay process), where the table is shown (`sinks/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLUMNS = ("step", "prompt_id", "prompt", "completion", "reward", "acc", "turns", "tokens", "finish_reason", "versions")
MAX_CHARS = 10_000
"""Of a text. A longer one shows its beginning and its end."""
SPEAKERS = ("environment", "model")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion that was trained on."""

    step: int
    prompt_id: int
    prompt: str
    """As the model read it, with special tokens."""
    parts: Sequence[tuple[int, str]]
    """What the model wrote (1) and what its environment said (0), in order, with special tokens."""
    reward: float
    acc: float
    turns: int
    tokens: int
    """Sampled ones."""
    finish_reason: str
    versions: tuple[int, int]
    """Lowest and highest of the weights that sampled it."""

    def row(self) -> list[str | int | float]:
        """The values of `COLUMNS`."""
        versions = " to ".join(map(str, sorted(set(self.versions))))
        texts = {"prompt": cut(self.prompt), "completion": cut(self._completion), "versions": versions}
        return [texts[column] if column in texts else getattr(self, column) for column in COLUMNS]

    @property
    def _completion(self) -> str:
        """With several parts, a line says whose each of them is."""
        if len(self.parts) == 1:
            return self.parts[0][1]
        return "\n".join(f"[{SPEAKERS[sampled]}]\n{text}" for sampled, text in self.parts)


def as_markdown(samples: Sequence[Sample]) -> str:
    """A table, whose texts are code: nothing in them is read as markup. At least one sample."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(map(_cell, sample.row()) for sample in samples)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: str | int | float) -> str:
    """A line of code cannot hold a line break, nor a cell its border."""
    return f"`{str(value).translate({10: '⏎', 96: 'ˋ', 124: '¦'})}`"


def cut(text: str) -> str:
    """At most `MAX_CHARS` of it, and how many are left out."""
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters …\n{text[-half:]}"
