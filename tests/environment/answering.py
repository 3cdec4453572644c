"""An environment for the quickstart's start model: it asks back once, and then rewards what it can't have known."""


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
