"""The verifier `answer`."""

import pytest

from asyncdapo.reward.registry import make_verifier

verify = make_verifier("answer")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6+4=0\n0*7=0\nAnswer: 6", "6"),
        ("Answer: 6", "6"),
        ("Answer: 6\n", "6"),
        ("Answer:  6 \n\n", " 6 "),
        ("I think so. Answer: 6", "6"),
        ("Answer: 5\nno, wait\nAnswer: 6", "6"),
        ("Answer: two words", "two words"),
    ],
)
def test_text_that_ends_with_the_answer_is_right(text, answer):
    assert verify(text, answer)["acc"] == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "6"),
        ("6", "6"),
        ("Answer:", "6"),
        ("Answer: ", "6"),
        ("Answer:6", "6"),
        ("answer: 6", "6"),
        ("Answer: 7", "6"),
        ("Answer: 66", "6"),
        ("Answer: 6.0", "6"),
        ("Answer: 6\nAnswer: 7", "6"),
        ("Answer: 6\nand more", "6"),
        ("Answer: 6 apples", "6"),
        ("Answer: Two", "two"),
        ("Answer: 6 Answer: ", "6"),
    ],
)
def test_anything_else_is_wrong(text, answer):
    assert verify(text, answer)["acc"] == 0.0
