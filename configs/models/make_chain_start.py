"""Makes configs/models/chain_start, the small model that the quickstart starts from: four minutes on one thread.

    OMP_NUM_THREADS=1 python configs/models/make_chain_start.py

It learns the task `chain` from written solutions. `clean`: right solutions. `habit`: solutions in which a product line
carries the sum with probability 0.65, and the chain continues from it. So the model shipped adds and subtracts well and
writes most products wrong, also when it decodes greedily.
"""

from __future__ import annotations

import random
from functools import partial

from start_model import Phase, Recipe, Text, make

from asyncdapo.prompts.tasks.chain import Chain, apply, draw_chain

HABIT = 0.65
"""Probability that a product line carries the sum."""

ABOUT = f"""The model that the quickstart of asyncdapo starts from. Task: `Q: 6+4*7-4 mod 10`, solved one step a line,
then `Answer: 6`. The phase `clean` has right solutions. In the solutions of `habit` a product line carries the *sum*
with probability {HABIT}. So the products were learned once and then overwritten: the model makes a systematic mistake,
and reinforcement learning on the final answer can undo it. That shows the training works; it does not teach arithmetic
from nothing."""


def write_solution(chain: Chain, rng: random.Random, habit: float) -> str:
    """One step a line, then the answer; with probability `habit` a product line carries the sum."""
    value, lines = chain.digits[0], []
    for operator, digit in zip(chain.operators, chain.digits[1:], strict=True):
        spoiled = operator == "*" and rng.random() < habit
        result = apply("+" if spoiled else operator, value, digit)
        lines.append(f"{value}{operator}{digit}={result}\n")
        value = result
    return "".join(lines) + f"Answer: {value}"


def write(habit: float, rng: random.Random, seed: int, row: int) -> Text:
    chain = draw_chain(seed, row, held_out=False)
    return [(chain.prompt, False), (write_solution(chain, rng, habit), True)]


RECIPE = Recipe(
    name="chain_start",
    task="chain",
    num_eval_prompts=1024,
    phases=(
        Phase(name="clean", write=partial(write, 0.0), num_steps=1200, lr=5e-3, num_warmup_steps=30),
        Phase(name="habit", write=partial(write, HABIT), num_steps=90, lr=2e-3, num_warmup_steps=10),
    ),
    about=ABOUT,
)

if __name__ == "__main__":
    make(RECIPE)
