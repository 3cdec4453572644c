"""Sieve: the rows of a split that a run can use, and counts of the rows dropped at each stage.

    read ─▶ repeated ─▶ unusable ─▶ same prompt, other answer ─▶ too long ─▶ kept

In: raw rows. Out: kept rows; `counts`, which add up to `read`; and, for each row that is unusable or contradicts
another one, a record of the problem. Of repeated rows the first is kept. Memory: some 200 bytes for each distinct row.
Does not own: files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from asyncdapo.prompts.prepare.rows import RawRow
from asyncdapo.prompts.prepare.shape import Shape
from asyncdapo.prompts.tasks.file import shown

STAGES = {
    "repeated": "the same row again",
    "unusable": "listed in unusable.jsonl",
    "same_prompt": "the same prompt and answer in another row",
    "other_answer": "the same prompt with another answer, listed in unusable.jsonl",
    "too_long": "more tokens than --max-prompt-length",
    "kept": "",
}
Report = Callable[[dict[str, object]], None]


@dataclass(frozen=True, slots=True)
class KeptRow:
    """A row of the output; `row` is its number in the input, over all files of the split, from 0."""

    prompt: str
    answer: str
    source: str
    row: int


@dataclass(kw_only=True)
class SystemPrompt:
    """The one system prompt of a data set: the user's, or that of the first usable row."""

    text: str | None = None
    given: bool = False
    settled: bool = False

    def check(self, text: str | None) -> None:
        """Raises ValueError for a different one. The user's also applies to rows without a system prompt."""
        if not self.given and not self.settled:
            self.text, self.settled = text, True
        if text != self.text and not (self.given and text is None):
            whose = "--system-prompt" if self.given else "that of the first row"
            raise ValueError(f"its system prompt is {_or_none(text)}, {whose} is {_or_none(self.text)}")


@dataclass(kw_only=True)
class Sieve:
    """Filters the rows of one split."""

    shape: Shape
    name: str
    """Source of rows that don't name theirs."""
    template: Callable[[bool], str]
    """Whether the question came as messages -> the template that it goes into."""
    system: SystemPrompt
    fits: Callable[[str], bool] = lambda prompt: True
    """Whether a prompt is short enough."""
    from_messages: bool = False
    """Whether a kept row came as messages: such data needs a chat template."""
    counts: dict[str, int] = field(default_factory=lambda: {"read": 0, **dict.fromkeys(STAGES, 0)})
    _seen: set[bytes] = field(default_factory=set, init=False)
    """Digests of all rows so far."""
    _prompts: dict[bytes, tuple[int, bytes]] = field(default_factory=dict, init=False)
    """By the digest of each prompt: the number of its first row, and the digest of the answer there."""

    def keep(self, file: Path, rows: Iterable[RawRow], report: Report) -> Iterator[KeptRow]:
        """The kept rows of one file. `report` gets a record of each row that unusable.jsonl lists."""
        for raw in rows:
            number = self.counts["read"]
            self.counts["read"] += 1
            if raw.digest in self._seen:
                self.counts["repeated"] += 1
                continue
            self._seen.add(raw.digest)
            stage, reason, kept = self._judge(raw, number)
            self.counts[stage] += 1
            if reason:
                report({"row": number, "file": file.name, "place": raw.place, "reason": reason, "value": _excerpt(raw)})
            if kept is not None:
                yield kept

    def _judge(self, raw: RawRow, number: int) -> tuple[str, str, KeptRow | None]:
        """The stage at which a row ends, the reason if it is to be listed, and the row if it is kept."""
        try:
            item = self.shape.read(raw.read(), self.name)
            self.system.check(item.system)
        except ValueError as error:
            return "unusable", str(error), None
        prompt = self.template(item.from_messages).replace("{prompt}", item.prompt)
        key, answer = _digest(prompt), _digest(item.answer.strip())
        if key in self._prompts:
            first, first_answer = self._prompts[key]
            if answer == first_answer:
                return "same_prompt", "", None
            return "other_answer", f"the prompt of row {first} with another answer: {shown(item.answer)}", None
        self._prompts[key] = (number, answer)
        if not self.fits(prompt):
            return "too_long", "", None
        self.from_messages |= item.from_messages
        return "kept", "", KeptRow(prompt, item.answer, item.source, number)


def _or_none(text: str | None) -> str:
    return "none" if text is None else shown(text)


def _excerpt(raw: RawRow) -> str:
    try:
        return shown(raw.read())
    except ValueError:
        return shown(raw.line[:100].decode(errors="replace"))


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
