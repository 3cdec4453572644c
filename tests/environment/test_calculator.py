"""The calculator that `quickstart_tools` trains with."""

import pytest

from asyncdapo.environment.calculator import Calculator


@pytest.fixture
def calculator():
    calculator = Calculator()
    calculator.reset({"answer": "4042"})
    return calculator


def test_it_answers_a_product_as_often_as_it_is_asked(calculator):
    assert calculator.step("47*86") == "4042\n"
    assert calculator.step("7*8") == "56\n"
    assert calculator.metrics() == {"calls": 2}


def test_the_right_answer_ends_the_episode_with_reward_one(calculator):
    assert calculator.step("Answer: 4042") == (None, 1.0)
    assert calculator.metrics() == {"calls": 0}


@pytest.mark.parametrize("response", ["", "Answer: 404", "Answer: 40420", " Answer: 4042", "47 * 86", "4*", "٤*٢"])
def test_anything_else_ends_it_with_reward_zero(calculator, response):
    assert calculator.step(response) == (None, 0.0)


def test_it_does_not_work_on_numbers_without_a_bound(calculator):
    assert calculator.step("9" * 1000 + "*9") == (None, 0.0)
