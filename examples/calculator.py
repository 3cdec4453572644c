"""A calculator for a model that can't multiply: `environment.path=examples/calculator.py:Calculator`"""

import re


class Calculator:
    """One episode."""

    def reset(self, row):
        self.answer, self.num_calls = row["answer"], 0

    def step(self, response):
        asked = re.fullmatch(r"(\d+)\*(\d+)", response)
        if asked is None:
            return None, float(response == f"Answer: {self.answer}")
        self.num_calls += 1
        return f"{int(asked[1]) * int(asked[2])}\n"

    def metrics(self):
        return {"calls": self.num_calls}
