"""The verifiers `dapo`, `exact`, `gsm8k` and `math_verify`: what is right, what is wrong, and that none takes longer
than the text is long."""

import random
import re
import time

import pytest

from asyncdapo.reward.registry import make_verifier
from asyncdapo.reward.verifiers import dapo


def is_right(verifier, text, answer):
    acc = make_verifier(verifier)(text, answer)["acc"]
    assert acc in (0.0, 1.0)
    return acc == 1.0


@pytest.mark.parametrize(
    ("verifier", "text", "answer", "pred"),
    [
        ("answer", "Answer: 5\nAnswer:  6 \n", "7", "6"),
        ("answer", "6", "6", None),
        ("answer", "Answer: ", "6", ""),
        ("exact", " two words\n", "6", "two words"),
        ("dapo", r"Answer: $\frac12$", "1", r"\frac{1}{2}"),
        ("dapo", "42", "42", None),
        ("gsm8k", "#### $1,234.50 or so", "7", "1234.5"),
        ("gsm8k", "#### 1200", "7", "1200"),
        ("gsm8k", "#### -0.0", "7", "0"),
        ("gsm8k", "#### " + 40 * "9", "7", 40 * "9"),
        ("gsm8k", "#### seventy", "7", None),
        ("gsm8k", "70", "70", None),
        ("math_verify", r"\boxed{\frac{1}{3}}", "7", r"\frac{1}{3}"),
        ("math_verify", "no idea", "7", None),
    ],
)
def test_a_verifier_says_what_it_took_for_the_answer(verifier, text, answer, pred):
    """Right or wrong, and the same for all spellings that it holds for equal, where it has a normal form."""
    assert make_verifier(verifier)(text, answer)["pred"] == pred


# ---------------------------------------------------------------------------------------------------------------- dapo


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is so.\nAnswer: 42", "42"),
        ("Answer:\n\n42", "42"),
        ("Answer: 42\r\n", "42"),
        ("Answer: an apple", "apple"),
        ("Answer: it is $42.$ as I said", "42"),
        ("Answer: $x = 40 + 2 = 42$", "42"),
        ("Answer: 1,234,567", "1234567"),
        (r"Answer: \mbox{yes}", r"\text{yes}"),
        (r"Answer: 3\text{ and }5", "3,5"),
        (r"Answer: $3,\text{and}5$", "3,5"),
        (r"Answer: \boxed{\frac{1}{2}}", r"\frac12"),
        (r"Answer: \sqrt2", r"\sqrt{2}"),
        (r"Answer: \overline{AB}", "AB"),
        (r"Answer: 15^{\circ}", "15 degrees"),
        (r"Answer: 5\text{ m}^2", "5"),
        (r"Answer: \$5", "5 dollars"),
    ],
)
def test_dapo_accepts_the_usual_spellings(text, answer):
    assert is_right("dapo", text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("Answer: 42\nAnswer: 43", "42"),
        ("Answer: 42" + "\n" * 300, "42"),
        ("Answer: 42 apples", "42"),
        ("Answer: 42.0", "42"),
        ("", ""),
    ],
)
def test_dapo_compares_strings_behind_the_last_marker(text, answer):
    assert not is_right("dapo", text, answer)


def normalised_by_regular_expressions(answer):
    """The rule with an expression for each span, which on long strings takes the square of their length."""
    answer = answer.split("=")[-1]
    for old, new in dapo.REPLACED + tuple((expression, "") for expression in dapo.DELETED):
        answer = answer.replace(old, new)
    answer = re.sub(r".*?\$(.*?)\$.*", r"$\1$", answer)
    for command in ("text", "textbf", "overline"):
        answer = re.sub(rf"\\{command}\{{(.*?)\}}", r"\1", answer)
    answer = re.sub(r"\\boxed\{(.*)\}", r"\1", answer)
    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)
    answer = re.sub(r"sqrt([^{])", r"sqrt{\1}", answer).replace("$", "")
    return (answer.replace(",", "") if answer.replace(",", "").isdigit() else answer).strip()


def test_dapo_normalises_as_its_regular_expressions_would():
    draw = random.Random(0)
    parts = [
        r"\text{",
        r"\textbf{",
        r"\overline{",
        r"\boxed{",
        "}",
        "{",
        "$",
        ".$",
        r"\$",
        "=",
        "frac",
        "sqrt",
        "1",
        "2",
    ]
    parts += [",", "\n", " ", r"\ ", "a ", "an ", "mbox", r"\text{and}", r"\text{m}", r"\text{}", "^2", "km", r"^\circ"]
    parts += ["\t", "\r", "\x85", "x", "{,}", "²"]
    for _ in range(20_000):
        answer = "".join(draw.choices(parts, k=draw.randint(0, 14)))
        assert dapo.normalise(answer) == normalised_by_regular_expressions(answer)


# ------------------------------------------------------------------------------------------------------- exact, gsm8k


def test_exact_compares_the_whole_response():
    assert is_right("exact", " two words\n", "two words")
    assert not is_right("exact", "Answer: 6", "6")
    assert not is_right("exact", "Two words", "two words")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 * 12 = 72\n#### 72", "72"),
        ("####72 apples", "72"),
        ("#### $1,234.50", "1234.5"),
        ("#### -$5", "-5"),
        ("#### 72.", "72"),
        ("#### 72.00", "72"),
        ("#### 7\nno\n#### 8", "She sold 4+4=<<4+4=8>>8.\n#### 8"),
        ("####\n.5", "0.5"),
    ],
)
def test_gsm8k_finds_the_number_behind_the_last_mark(text, answer):
    assert is_right("gsm8k", text, answer)


@pytest.mark.parametrize("text", ["72", "### 72", "#### seventy-two", "#### 72\n####", "#### 7 2", "#### 720", ""])
def test_gsm8k_takes_nothing_else_for_the_number(text):
    assert not is_right("gsm8k", text, "#### 72")


def test_gsm8k_says_when_the_expected_answer_has_no_number():
    with pytest.raises(ValueError, match="no number in the expected answer 'seventy'"):
        make_verifier("gsm8k")("#### 72", "seventy")


# -------------------------------------------------------------------------------------------------------- math_verify


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", "0.5"),
        ("So it is $0.5$.", r"\frac{1}{2}"),
        ("The answer is 1/2", r"$\frac{1}{2}$"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"$x = 3$, hence \boxed{x = 3}", "3"),
        (r"$\{2, 1\}$", r"\{1,2\}"),
        ("x" * 10_000 + r" so \boxed{7}", "7"),
    ],
)
def test_math_verify_compares_values(text, answer):
    assert is_right("math_verify", text, answer)


@pytest.mark.parametrize("text", ["", "no idea", r"\boxed{}", r"\boxed{\frac{1}{3}}", r"\boxed{7}" + "x" * 5000, "\0$"])
def test_math_verify_takes_no_other_value(text):
    assert not is_right("math_verify", text, "7")


def test_math_verify_says_when_the_expected_answer_has_no_value():
    with pytest.raises(ValueError, match="no formula in the expected answer ''"):
        make_verifier("math_verify")("$1$", "")


# ---------------------------------------------------------------------------------------------------------- long texts

HOSTILE = [
    r"\text{",
    r"\boxed{",
    "$",
    "}",
    "=",
    "Answer:",
    "an ",
    "frac",
    r"\text{}",
    "####",
    "1",
    ",",
    "<answer>",
    "\n",
]


@pytest.mark.parametrize("verifier", ["answer", "dapo", "exact", "gsm8k"])
def test_ten_times_the_length_takes_no_more_than_linear_time(verifier):
    """The square of the length would take a hundred times as long."""
    verify = make_verifier(verifier)

    def seconds(num_chars):
        began = time.process_time()
        for part in HOSTILE:
            text = part * (num_chars // len(part))
            for answer in ("6", text + "#### 6"):
                verify(text, answer)
                verify("#### 6\nAnswer: " + text, answer)
        return time.process_time() - began

    assert seconds(400_000) < 50 * max(seconds(40_000), 1e-3)
