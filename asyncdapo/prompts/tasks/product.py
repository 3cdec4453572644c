"""Task `product`: multiply two numbers of two digits. A finite table, no download.

    prompt    "Q: 47*86\n"
    answer    "4042"

It is for a model that can't multiply but may ask a calculator (`environment/calculator`). A checksum of its prompt
decides whether a question is held out for evaluation or used for training. The tables are the same in every run. They
are in the order of the checksums, so their first rows are a fair sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from zlib import crc32

from asyncdapo.prompts.task import Part, Question

HELD_OUT_SHARE = 16
"""One in this many questions is held out."""


class ProductTask:
    """All products of two numbers from 10 to 99: each is a training question or a held-out one."""

    def __init__(self) -> None:
        factors = range(10, 100)
        answers = {f"Q: {left}*{right}\n": str(left * right) for left in factors for right in factors}
        prompts = sorted(answers, key=_checksum)
        self._held_out = _questions(answers, [text for text in prompts if _checksum(text) % HELD_OUT_SHARE == 0])
        self._training = _questions(answers, [text for text in prompts if _checksum(text) % HELD_OUT_SHARE])

    @property
    def parts(self) -> Sequence[Part]:
        return [Part(name="product", rows=range(len(self._training)), weight=Fraction(1))]

    @property
    def num_eval_rows(self) -> int:
        return len(self._held_out)

    def question_at(self, row: int) -> Question:
        return self._training[row]

    def eval_question_at(self, row: int) -> Question:
        return self._held_out[row]


def _checksum(text: str) -> int:
    return crc32(text.encode())


def _questions(answers: dict[str, str], prompts: Sequence[str]) -> list[Question]:
    return [Question(text=text, answer=answers[text], source="product", row=row) for row, text in enumerate(prompts)]
