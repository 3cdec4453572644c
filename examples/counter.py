"""An environment as TRL has them: `environment.path=examples/counter.py:Counter`"""


class Counter:
    def reset(self, answer, **row):
        self.total, self.wanted = 0, int(answer)
        return " Reach the answer with the tool add."

    def add(self, number: int) -> str:
        """Add to the counter.

        Args:
            number: What to add.
        """
        self.total += number
        return f"the counter is at {self.total}"

    def get_reward(self) -> float:
        return float(self.total == self.wanted)
