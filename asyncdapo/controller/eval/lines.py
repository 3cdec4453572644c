"""Lines of answers.jsonl: one completion of an evaluation each, with all that is needed to judge it by eye.

In: what an evaluation asked and what came back. Out: a line, and back from a file the lines that are whole: one that a
killed process left half written is no answer. Does not own: the file (`answers`), the page (`page`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from asyncdapo.controller.eval.evaluation import Answered
from asyncdapo.errors import UserError
from asyncdapo.eval_messages import EvalAnswer
from asyncdapo.messages import FinishReason, Prompt, Runs


class AnswerLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line, in this order. What has a default is left out where it has it."""

    prompt_id: int
    sample: int
    """Number of the completion among those of its prompt; 0 for a greedy one."""
    greedy: bool
    source: str
    """The data that the prompt comes from, and its row there."""
    row: int
    prompt: str
    """What the model was given, special tokens written out."""
    answer: str
    """What the verifier expected."""
    response: str
    """What the model wrote, without special tokens; of an episode, what its environment said between, too."""
    pred: str | None
    """What the verifier took for the response's answer; null where it found none or doesn't say."""
    acc: float
    """The verdict, 0 to 1."""
    failure: str
    """Why there is no verdict, which counts as 0: what the reward function raised. Empty where there is one."""
    num_tokens: int
    """Length of the response."""
    finish_reason: FinishReason
    version_min: int
    """Lowest and highest version of the weights that sampled it."""
    version_max: int
    metrics: dict[str, float] = {}
    """Of an episode: its environment's own numbers."""
    sampled: Runs = []
    """Of an episode: whose the response's characters are (`EvalAnswer`)."""

    @property
    def failed(self) -> bool:
        """Whether it could not be judged."""
        return bool(self.failure)

    @classmethod
    def of(cls, answered: Answered, prompt: Prompt, text: str) -> AnswerLine:
        """`text`: the prompt as the model reads it."""
        answer = answered.answer
        return cls(
            greedy=answered.greedy,
            source=prompt.source,
            row=prompt.row,
            prompt=text,
            answer=prompt.answer,
            **msgspec.structs.asdict(answer),
        )

    def answered(self) -> Answered:
        """What it was made of."""
        values = {name: getattr(self, name) for name in EvalAnswer.__struct_fields__}
        return Answered(EvalAnswer(**values), self.greedy)


_DECODER = msgspec.json.Decoder(AnswerLine)


def encode(line: AnswerLine) -> bytes:
    """With the end of the line."""
    return msgspec.json.encode(line) + b"\n"


def read_lines(path: Path) -> Iterator[AnswerLine]:
    """The whole lines of a file, one after another; none where there is no file. Raises UserError for a line that is
    damaged."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield _DECODER.decode(line)
            except ValueError as error:
                fix = "remove the line and metrics.json: it is asked for again"
                raise UserError(f"{path}: line {number} is no answer of an evaluation: {error} ({fix})") from error


def cut_torn_line(path: Path) -> None:
    """Take away a last line that has no end."""
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        while end > 0:
            begin = max(0, end - (1 << 16))
            file.seek(begin)
            if (newline := file.read(end - begin).rfind(b"\n")) >= 0:
                file.truncate(begin + newline + 1)
                return
            end = begin
        file.truncate(0)
