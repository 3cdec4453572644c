"""An environment: multiplies for a model that can't. `environment.path=asyncdapo.environment.calculator:Calculator`

    Q: 47*86        the prompt, of the task `product`
    47*86           a response: asks the calculator
    4042            the observation
    Answer: 4042    a response: ends the episode, and is right

A response that isn't a product ends the episode. The reward is 1 for the right answer and 0 for any other.
"""

from __future__ import annotations

import re
from typing import Any

PRODUCT = re.compile(r"([0-9]{1,9})\*([0-9]{1,9})")


class Calculator:
    """One episode. `calls` counts what the calculator was asked."""

    def __init__(self) -> None:
        self._answer, self._num_calls = "", 0

    def reset(self, row: dict[str, Any]) -> None:
        self._answer = row["answer"]

    def step(self, response: str) -> str | tuple[None, float]:
        asked = PRODUCT.fullmatch(response)
        if asked is None:
            return None, float(response == f"Answer: {self._answer}")
        self._num_calls += 1
        return f"{int(asked[1]) * int(asked[2])}\n"

    def metrics(self) -> dict[str, float]:
        return {"calls": self._num_calls}
