"""Task `chain`: evaluate a left-to-right chain of + - * modulo 10. Generated on the fly, endless, no download.

    prompt    "Q: 6+4*7-4 mod 10\n"
    response  "6+4=0\n0*7=0\n0-4=6\nAnswer: 6"      one step a line; written by the model, not by this module

Seed and row determine a chain. A checksum of its prompt decides whether a chain is `held_out` for evaluation or used
for training, so that no chain is in both, whatever the seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

from asyncdapo.prompts.task import Question
from asyncdapo.seeds import sample_seed

MIN_OPERATORS, MAX_OPERATORS, MEAN_EXTRA_OPERATORS = 2, 18, 5.0
HELD_OUT_SHARE = 16
"""One in this many chains is held out."""
EVAL_SEED = 0
"""Evaluation prompts are the same in every run, so that runs can be compared."""


@dataclass(frozen=True)
class Chain:
    """Digits 0-9 with one operator between neighbours; no precedence, every step modulo 10."""

    digits: tuple[int, ...]
    operators: str

    @property
    def prompt(self) -> str:
        steps = "".join(f"{operator}{digit}" for operator, digit in zip(self.operators, self.digits[1:], strict=True))
        return f"Q: {self.digits[0]}{steps} mod 10\n"

    @property
    def answer(self) -> str:
        value = self.digits[0]
        for operator, digit in zip(self.operators, self.digits[1:], strict=True):
            value = apply(operator, value, digit)
        return str(value)

    @property
    def held_out(self) -> bool:
        return crc32(self.prompt.encode()) % HELD_OUT_SHARE == 0


def apply(operator: str, left: int, right: int) -> int:
    """One step of a chain."""
    match operator:
        case "+":
            return (left + right) % 10
        case "-":
            return (left - right) % 10
        case _:
            return left * right % 10


def draw_chain(seed: int, row: int, *, held_out: bool) -> Chain:
    """The chain of this seed and row: the first draw whose `held_out` is as asked."""
    draws = _draws(random.Random(sample_seed(seed, row)))
    return next(chain for chain in draws if chain.held_out == held_out)


def _draws(rng: random.Random) -> Iterator[Chain]:
    while True:
        num_operators = MIN_OPERATORS + int(rng.expovariate(1 / MEAN_EXTRA_OPERATORS))
        if num_operators <= MAX_OPERATORS:
            digits = tuple(rng.randrange(10) for _ in range(num_operators + 1))
            yield Chain(digits, "".join(rng.choice("+-*") for _ in range(num_operators)))


class ChainTask:
    """Endless questions for training, and an endless table of held-out ones."""

    parts = None
    num_eval_rows = None

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def question_at(self, row: int) -> Question:
        return _question(row, draw_chain(self._seed, row, held_out=False))

    def eval_question_at(self, row: int) -> Question:
        return _question(row, draw_chain(EVAL_SEED, row, held_out=True))


def _question(row: int, chain: Chain) -> Question:
    return Question(text=chain.prompt, answer=chain.answer, source="chain", row=row)
