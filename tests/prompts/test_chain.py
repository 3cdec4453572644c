"""The task `chain`: what a prompt looks like, what its answer is, and which part it belongs to."""

import re
from collections import Counter
from zlib import crc32

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.prompts.tasks.chain import Chain, ChainTask, draw_chain

SEEDS, ROWS = st.integers(0, 2**62), st.integers(0, 2**40)


def test_the_answer_is_worked_out_from_left_to_right_modulo_ten():
    chain = Chain((6, 4, 7, 4), "+*-")
    assert chain.prompt == "Q: 6+4*7-4 mod 10\n"
    assert chain.answer == "6"
    assert Chain((0, 4), "-").answer == "6"


@given(seed=SEEDS, row=ROWS)
@settings(max_examples=200, deadline=None)
def test_a_prompt_agrees_with_its_answer(seed, row):
    question = ChainTask(seed).question_at(row)
    first, steps = re.fullmatch(r"Q: (\d)((?:[-+*]\d){2,18}) mod 10\n", question.text).groups()
    value = int(first)
    for step in re.findall("..", steps):
        value = eval(f"{value}{step}") % 10  # noqa: S307  an independent reading of the text
    assert question.answer == str(value)
    assert question.row == row


@given(seed=SEEDS, row=ROWS, eval_row=ROWS)
@settings(max_examples=200, deadline=None)
def test_no_held_out_prompt_is_ever_trained_on(seed, row, eval_row):
    task = ChainTask(seed)
    assert crc32(task.question_at(row).text.encode()) % 16 != 0
    assert crc32(task.eval_question_at(eval_row).text.encode()) % 16 == 0


def test_the_same_seed_and_row_make_the_same_question():
    first, again, other = ChainTask(5), ChainTask(5), ChainTask(6)
    rows = range(50)
    assert [first.question_at(row) for row in rows] == [again.question_at(row) for row in reversed(rows)][::-1]
    assert [first.question_at(row) for row in rows] != [other.question_at(row) for row in rows]


def test_evaluation_has_the_same_questions_whatever_the_seed():
    assert [ChainTask(1).eval_question_at(row) for row in range(20)] == [
        ChainTask(2).eval_question_at(row) for row in range(20)
    ]


def test_chains_have_two_to_eighteen_operators_with_the_stated_distribution():
    counts = Counter(len(draw_chain(0, row, held_out=False).operators) for row in range(4000))
    assert min(counts) == 2
    assert max(counts) == 18
    assert 0.16 < counts[2] / 4000 < 0.22, "1 - exp(-1/5) = 0.181, 0.188 after the redraws above 18"
    symbols = Counter("".join(draw_chain(0, row, held_out=False).operators for row in range(1000)))
    assert max(symbols.values()) < 1.1 * min(symbols.values())
