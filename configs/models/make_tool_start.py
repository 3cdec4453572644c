"""Makes configs/models/tool_start, the small model that `quickstart_tools` starts from: two minutes on one thread.

    OMP_NUM_THREADS=1 python configs/models/make_tool_start.py

    Q: 47*86        given
    47*86           written
    4042            given by the calculator
    Answer: 4042    written

It learns to ask the calculator and to copy what that says; it never learns to multiply. `clean`: such episodes.
`habit`: in half of them the model gives up at once (`Answer: ?`). In most of the others it leaves out the last digit
of what the calculator said. So the model shipped answers most questions wrong, also when it decodes greedily.
"""

from __future__ import annotations

import random
from functools import partial

from start_model import Phase, Recipe, Text, make

from asyncdapo.prompts.tasks.product import ProductTask

GIVE_UP, CUT = 0.5, 0.7
"""Probabilities of the habit: that the model gives up at once; that the answer of another episode is cut."""
TASK = ProductTask()
[TRAINING] = TASK.parts

ABOUT = f"""The model that `quickstart_tools` of asyncdapo starts from. Task: `Q: 47*86`. It may ask a calculator with
`47*86`, which says `4042`, and then writes `Answer: 4042`. It never learns to multiply. The phase `clean` has such
episodes. In those of `habit` it gives up at once, `Answer: ?`, with probability {GIVE_UP}. Otherwise it asks, and with
probability {CUT} it leaves out the last digit of what the calculator said. So asking and copying were learned once and
then overwritten, and reinforcement learning on the final answer can bring them back."""


def write(give_up: float, cut: float, rng: random.Random, seed: int, row: int) -> Text:
    """An episode. The prompt is drawn from `rng`, since the tables are the same for every seed."""
    question = TASK.question_at(rng.choice(TRAINING.rows))
    if rng.random() < give_up:
        return [(question.text, False), ("Answer: ?", True)]
    said = question.answer[:-1] if rng.random() < cut else question.answer
    product = question.text.removeprefix("Q: ").rstrip()
    return [(question.text, False), (product, True), (f"{question.answer}\n", False), (f"Answer: {said}", True)]


unsorted = partial(Phase, num_batches_sorted=1)
"""Not sorted by length: batches of those that give up alone would teach to give up always, and then never."""
RECIPE = Recipe(
    name="tool_start",
    task="product",
    num_eval_prompts=TASK.num_eval_rows,
    phases=(
        unsorted(name="clean", write=partial(write, 0.0, 0.0), num_steps=500, lr=5e-3, num_warmup_steps=30),
        unsorted(name="habit", write=partial(write, GIVE_UP, CUT), num_steps=160, lr=1e-3, num_warmup_steps=10),
    ),
    about=ABOUT,
)

if __name__ == "__main__":
    make(RECIPE)
