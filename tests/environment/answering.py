"""An environment for the quickstart's start model: it asks back once, and then rewards what it can't have known."""

import asyncio
import random


class AsksBack:
    def reset(self, row):
        self.answer = row["answer"]
        self.num_asked = 0

    async def step(self, response):
        if self.num_asked:
            return None, float(sum(map(ord, response)) % 2)
        self.num_asked = 1
        return "Q: 7*6\n"

    def metrics(self):
        return {"asked": self.num_asked}


class AsksBackLater(AsksBack):
    """Takes so long that train steps fall between two turns."""

    async def step(self, response):
        await asyncio.sleep(random.uniform(0.2, 2))
        return await super().step(response)
