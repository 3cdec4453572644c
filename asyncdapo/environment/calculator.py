"""A calculator for a model that can't multiply. `environment.path=asyncdapo.environment.calculator:Calculator`

Q: 47*86        the prompt, of the task `product`
47*86           a response: asks the calculator
4042            the observation
Answer: 4042    a response: ends the episode, and is right
"""

import re

PRODUCT = re.compile(r"([0-9]{1,9})\*([0-9]{1,9})")


class Calculator:
    """One episode."""

    def __init__(self):
        self.answer, self.num_calls = "", 0

    def reset(self, row):
        self.answer = row["answer"]

    def step(self, response):
        asked = PRODUCT.fullmatch(response)
        if asked is None:
            return None, float(response == f"Answer: {self.answer}")
        self.num_calls += 1
        return f"{int(asked[1]) * int(asked[2])}\n"

    def metrics(self):
        return {"calls": self.num_calls}
