"""The start model of `quickstart_tools`, and the script that makes it."""

import importlib
import random
from pathlib import Path

import pytest

from asyncdapo.environment.calculator import Calculator
from asyncdapo.prompts.tasks.product import ProductTask

MODELS = Path(__file__).parents[2] / "configs" / "models"


@pytest.fixture(scope="module")
def script():
    """The script as a module; it lies outside the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MODELS)
        yield importlib.import_module("make_tool_start")


def play(text):
    """The reward of a written episode. What is given behind the prompt has to be what the calculator says."""
    (prompt, _), *pieces = text
    calculator, said = Calculator(), None
    left, right = map(int, prompt.removeprefix("Q: ").split("*"))
    calculator.reset({"answer": str(left * right)})
    for piece, written in pieces:
        if written:
            said = calculator.step(piece)
        else:
            assert piece == said
    assert isinstance(said, tuple), "the last piece ends the episode"
    return said[1]


def test_a_clean_episode_asks_the_calculator_and_is_right(script):
    rng = random.Random(0)
    for row in range(100):
        text = script.write(0.0, 0.0, rng, 0, row)
        assert [written for _, written in text] == [False, True, False, True]
        assert play(text) == 1.0


def test_who_gives_up_does_not_ask_the_calculator(script):
    text = script.write(1.0, 0.0, random.Random(0), 0, 0)
    assert [written for _, written in text] == [False, True]
    assert play(text) == 0.0


def test_a_cut_answer_lacks_the_last_digit(script):
    text = script.write(0.0, 1.0, random.Random(0), 0, 0)
    assert text[-1][0] == f"Answer: {text[-2][0].rstrip()[:-1]}"
    assert play(text) == 0.0


def test_no_held_out_prompt_is_written(script):
    rng, task = random.Random(0), ProductTask()
    held_out = {task.eval_question_at(row).text for row in range(task.num_eval_rows)}
    assert not held_out & {script.write(0.5, 0.5, rng, 0, row)[0][0] for row in range(5000)}
