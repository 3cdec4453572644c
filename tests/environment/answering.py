"""Environments for the quickstart's start model: they ask back once, and then reward what it can't have known."""

import random
import time
from pathlib import Path

from agents import call
from tokenizers import Tokenizer

START_MODEL = Path(__file__).parents[2] / "configs" / "models" / "chain_start"
MORE = "Q: 7*6\n"


class AsksBack:
    def reset(self, row):
        self.answer = row["answer"]
        self.num_asked = 0

    async def step(self, response):
        if self.num_asked:
            return None, float(sum(map(ord, response)) % 2)
        self.num_asked = 1
        return MORE

    def metrics(self):
        return {"asked": self.num_asked}


def forgets(row, base_url, api_key):
    """A history of two turns, then one that has forgotten the first. Train steps fall between them."""
    tokenizer = Tokenizer.from_file(str(START_MODEL / "tokenizer.json"))
    question, more = tokenizer.encode(row["prompt"]).ids, tokenizer.encode(MORE, add_special_tokens=False).ids
    first = call(base_url, api_key, question)
    time.sleep(random.uniform(0.2, 2))
    call(base_url, api_key, [*question, *first, *more])
    time.sleep(random.uniform(0.2, 2))
    call(base_url, api_key, [*question, *more])
    return float(random.random() < 0.5)  # no group is without variance
