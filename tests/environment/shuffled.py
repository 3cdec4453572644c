"""A calculator that a model can't learn anything from."""

from __future__ import annotations

import random

from asyncdapo.environment.calculator import PRODUCT, Calculator


class ShuffledCalculator(Calculator):
    """Gives the answer to another question."""

    def step(self, response: str) -> str | tuple[None, float]:
        if PRODUCT.fullmatch(response):
            response = f"{random.randrange(10, 100)}*{random.randrange(10, 100)}"
        return super().step(response)
