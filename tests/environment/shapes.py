"""Environments of every shape, for a host."""

import asyncio
from typing import Any, Literal


class Workshop:
    """The native contract with tools."""

    def __init__(self):
        self.num_calls = 0

    def reset(self, row):
        self.answer = row["answer"]

    def multiply(self, a: int, b: int = 1) -> int:
        """Multiply two whole numbers.

        Args:
            a: The first.
            b: The second. It may
                stand on two lines.
        """
        self.num_calls += 1
        return a * b

    async def wait(self, seconds: float) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return f"waited {seconds}"

    def give_up(self, function: str = "") -> None:
        """Raise.

        Args:
            function: Why.
        """
        raise RuntimeError(f"on fire: {function}")

    def exit(self) -> None:
        """End the process."""
        raise SystemExit(1)

    def helper(self, anything):
        return anything

    def step(self, response):
        return None, float(response == f"Answer: {self.answer}")

    def metrics(self):
        return {"calls": self.num_calls}


class Typed:
    """Tools of all types that a schema can have."""

    def reset(self, row):
        return None

    def every(
        self,
        text: str,
        flag: bool,
        many: list[int],
        pair: tuple[int, str],
        table: dict[str, float],
        anything: Any,
        choice: Literal["one", "two"],
        maybe: int | None = None,
        either: int | str = 0,
        nested: list[dict[str, int]] | str | None = None,
        bare: list | None = None,
    ) -> str:
        """Take everything.

        It has two paragraphs.

        Args:
            text: A text.
            flag: A flag.
            many: Many.
            pair: A pair.
            table: A table.
            anything: Anything.
            choice: One of two.
            maybe: Perhaps a number.
            either: Either.
            nested: A list of tables.
            bare: A list.

        Returns:
            Nothing of value.
        """
        return text


class Unannotated:
    def reset(self, row):
        return None

    def tool(self, a):
        """A tool."""


class Variadic:
    def reset(self, row):
        return None

    def tool(self, *words: str):
        """A tool."""


class Nothing:
    def reset(self, row):
        return None


class Counter:
    """TRL's shape."""

    def reset(self, answer, **row):
        self.total, self.wanted = 0, int(answer)
        return " Count!" if row["row"] else None

    def add(self, number: int) -> str:
        """Add to the counter.

        Args:
            number: What to add.
        """
        self.total += number
        return f"the counter is at {self.total}"

    def get_reward(self) -> float:
        return float(self.total == self.wanted)


class Scales(Counter):
    def weigh(self, what: str, times: int = 2) -> dict:
        """Weigh something, several times.

        Args:
            what: What to weigh.
            times: How often.
        """
        return {"what": what, "grams": [3.5] * times, "broken": None}


class Silent(Counter):
    def undocumented(self, number: int):
        return number


class Guess:
    """SkyRL's shape."""

    closed = 0

    def __init__(self, env_config: Any = None, extras: dict[str, Any] = {}):  # noqa: B006 - as theirs
        self.wanted, self.turns = extras["reward_spec"]["ground_truth"], 0

    def init(self, prompt):
        return [{"role": "system", "content": "Guess."}, *prompt], {}

    def step(self, action):
        self.turns += 1
        done = action == self.wanted
        said = [] if done else [{"role": "user", "content": f"not {action}"}]
        return {"observations": said, "reward": float(done), "done": done, "metadata": {}}

    def get_metrics(self):
        return {"turns": self.turns, "closed_before": Guess.closed}

    def close(self):
        Guess.closed += 1
