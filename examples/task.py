"""A task: sums of four digits modulo 10. `prompts.task=examples/task.py:Sums`"""

import random
from fractions import Fraction

from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.task import Part, Question

NUM_SUMS = 10_000


class Sums:
    """All sums in an order that the seed gives, the last of them held out."""

    def __init__(self, config: PromptsConfig, num_eval: int, seed: int) -> None:
        self.num_eval_rows = num_eval
        self._num_train = NUM_SUMS - num_eval
        self.parts = [Part(name="sums", rows=range(self._num_train), weight=Fraction(1))]
        self._order = random.Random(seed).sample(range(NUM_SUMS), NUM_SUMS)

    def question_at(self, row: int) -> Question:
        digits = f"{self._order[row]:04}"
        answer = sum(map(int, digits)) % 10
        return Question(text=f"Q: {'+'.join(digits)} mod 10\n", answer=str(answer), source="sums", row=row)

    def eval_question_at(self, row: int) -> Question:
        return self.question_at(self._num_train + row)
