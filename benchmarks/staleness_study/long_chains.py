"""Chains that are harder than the quickstart's, and as much longer: a task for `benchmarks/staleness.py`."""

from __future__ import annotations

import random

from asyncdapo.prompts.task import Question
from asyncdapo.prompts.tasks.chain import Chain
from asyncdapo.seeds import sample_seed


class LongChains:
    """Chains of 6 to 18 operators, each number as likely: twice the quickstart's tokens, and the more of them the
    harder the question. Training and evaluation share no chain."""

    parts = None
    num_eval_rows = None

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def question_at(self, row: int) -> Question:
        return self._draw(sample_seed(self._seed, row), row, held_out=False)

    def eval_question_at(self, row: int) -> Question:
        return self._draw(sample_seed(0, row), row, held_out=True)

    def _draw(self, seed: int, row: int, *, held_out: bool) -> Question:
        rng = random.Random(seed)
        while True:
            num_operators = rng.randint(6, 18)
            digits = tuple(rng.randrange(10) for _ in range(num_operators + 1))
            chain = Chain(digits, "".join(rng.choice("+-*") for _ in range(num_operators)))
            if chain.held_out == held_out:
                return Question(text=chain.prompt, answer=chain.answer, source="long", row=row)
