"""Answers per second of each verifier, as a rollout worker asks for them: groups of 16 to one process.

    python benchmarks/verifiers.py [--seconds 5] [VERIFIER …]

The answers are like those of a model that writes a few hundred characters and is right half of the time. VERIFIER is a
name, or your own function (`path/to/file.py:function`), which gets the answers for `dapo`. Also prints the start-up
time of a process. Wall time, so other work on the machine affects it.
"""

import argparse
import asyncio
import json
import random
import time

from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.registry import VERIFIERS

GROUP_SIZE = 16
TIMEOUT_S = 10.0
ENDINGS = {
    "answer": "Answer: {}",
    "exact": "{}",
    "gsm8k": "#### {}",
    "math_verify": r"Hence \boxed{{\frac{{{}}}{{1}}}}.",
    "reasoning_gym": "<answer>{}</answer>",
}


def make_group(verifier: str, draw: random.Random) -> tuple[list[str], str]:
    """Texts and the expected answer."""
    number = draw.randrange(1000)
    ending = ENDINGS.get(verifier, "Answer: ${}$")
    thoughts = (
        "" if verifier == "exact" else "We add the two numbers and take what is left of it. " * draw.randint(2, 10)
    )
    texts = [thoughts + ending.format(number + draw.randrange(2)) for _ in range(GROUP_SIZE)]
    if verifier != "reasoning_gym":
        return texts, str(number)
    entry = {"question": f"{number} + 0 =", "answer": str(number), "metadata": {}}
    return texts, json.dumps({"dataset": "chain_sum", "entry": entry})


async def measure(verifier: str, seconds: float) -> tuple[float, float]:
    """Answers per second, and seconds until the process was ready."""
    draw = random.Random(0)
    pool = ScorerPool(verifier, 1, TIMEOUT_S)
    began = time.perf_counter()
    await pool.start()
    start_s = time.perf_counter() - began
    try:
        await pool.verify(*make_group(verifier, draw))  # what is loaded at the first call
        began, num_answers = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            num_answers += len(await pool.verify(*make_group(verifier, draw)))
        return num_answers / (time.perf_counter() - began), start_s
    finally:
        await pool.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("verifiers", nargs="*", default=VERIFIERS)
    arguments = parser.parse_args()
    for verifier in arguments.verifiers:
        rate, start_s = asyncio.run(measure(verifier, arguments.seconds))
        print(f"{verifier:15} {rate:8,.0f} answers/s, {start_s:.1f} s to start")


if __name__ == "__main__":
    main()
