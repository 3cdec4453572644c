"""The task `product`: what it asks, and which questions are held out."""

import re

from asyncdapo.prompts.tasks.product import ProductTask

TASK = ProductTask()
TRAINING = [TASK.question_at(row) for part in TASK.parts for row in part.rows]
HELD_OUT = [TASK.eval_question_at(row) for row in range(TASK.num_eval_rows)]


def test_every_product_of_two_digit_numbers_is_asked_in_one_of_the_tables():
    assert {question.text for question in TRAINING + HELD_OUT} == {
        f"Q: {left}*{right}\n" for left in range(10, 100) for right in range(10, 100)
    }
    assert len(TRAINING) + len(HELD_OUT) == 90 * 90


def test_the_answer_is_the_product():
    for question in TRAINING + HELD_OUT:
        left, right = re.fullmatch(r"Q: (\d\d)\*(\d\d)\n", question.text).groups()
        assert int(question.answer) == int(left) * int(right)


def test_one_question_in_sixteen_is_held_out():
    assert 0.9 < len(HELD_OUT) * 16 / (90 * 90) < 1.1


def test_rows_count_from_zero_in_each_table():
    for table in (TRAINING, HELD_OUT):
        assert [question.row for question in table] == list(range(len(table)))


def test_the_first_held_out_questions_are_spread_over_all_factors():
    left = [int(question.text[3:5]) for question in HELD_OUT[:64]]
    assert min(left) < 25
    assert max(left) > 84
