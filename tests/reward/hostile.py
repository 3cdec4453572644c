"""Answers that a model may write, ordinary and hostile ones, with what has to become of each."""

from __future__ import annotations

import random
from dataclasses import dataclass

EXPECTED = "6"
"""The right answer to everything here."""

JUNK = [
    lambda draw: " ".join(draw.choices(["so", "we", "add", "6", "and", "=", "7", "then", "the", "sum"], k=40)),
    lambda draw: "".join(chr(draw.randrange(1, 0xD800)) for _ in range(300)),
    lambda draw: "".join(draw.choices("\ud800\udfff\udc00 a\n", k=300)),
    lambda draw: "\0" * draw.randrange(1, 1000) + "\x1b[31m\x07\x85\u2028\u202e",
    lambda draw: "{" * 100_000 + "1" + "}" * 100_000,
    lambda draw: "(" * 100_000,
    lambda draw: r"\frac{" * 20_000 + "1" + "}{2}" * 20_000,
    lambda draw: r"\boxed{" * 50_000,
    lambda draw: r"\text{\n" * 50_000,
    lambda draw: "Answer:" * 100_000,
    lambda draw: "Answer" + " " * 500_000,
    lambda draw: "#### " * 100_000,
    lambda draw: draw.choice(["a", "$", "1", "=", "\n", " ", "ü", "𝒳"]) * 1_000_000,
    lambda draw: r"$\begin{pmatrix}" + r"1 & \\ " * 20_000,
]
ENDINGS = {
    "answer": "\nso it is\nAnswer: {}",
    "dapo": "\nso it is\nAnswer: ${}$",
    "gsm8k": "\nso it is\n#### {}",
    "math_verify": "\nso it is\n" + r"\boxed{{\frac{{{}}}{{1}}}}",
}
BOMBS = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{10^{10^{10}}}",
    r"\boxed{1000000000!}",
    r"$\sum_{n=1}^{100000000} n^n$",
    r"$\int_0^1 e^{x^{x^x}} dx$",
    "$" + "(" * 1900 + "1" + ")" * 1900 + "$",
    "$" + r"\frac{1}{" * 200 + "1" + "}" * 200 + "$",
    "$" + "x_{1}*" * 500 + "1$",
]
SLOW = ["loop", "sleep 600", "freeze", "child /dev/null"]
FAILING = ["exit 0", "exit 3", "segfault", "close", "raise", "leave", "recurse", "return nan", "return list"]
HARMLESS = ["threads", "deaf", "hog", "fork", "print " + "x" * 100_000, "read", "print \0\ud800"]


@dataclass(frozen=True)
class Case:
    """One response. `outcome`: `right`, `wrong`, `judged` (either), `answered` (either, or too slow), `slow` (too slow)
    or `fails` (the verifier's failure, told as such)."""

    verifier: str
    text: str
    outcome: str


def make_case(verifier: str, draw: random.Random) -> Case:
    """Ordinary or hostile, nothing that takes its verifier's time or process."""
    if verifier == "user":
        if draw.random() < 0.02:
            return Case(verifier, draw.choice(HARMLESS), "judged")
        right = draw.random() < 0.5
        return Case(verifier, EXPECTED if right else draw.choice(JUNK)(draw), "right" if right else "wrong")
    junk = draw.choice(JUNK[:4] if draw.random() < 0.9 else JUNK)(draw)
    number = draw.choice([EXPECTED, "7", ""])
    if verifier == "exact":
        return Case(verifier, number or junk, "right" if number == EXPECTED else "wrong")
    if verifier == "math_verify" and not number:
        return Case(verifier, junk, "judged")
    text = junk + ENDINGS[verifier].format(number) if number else junk
    return Case(verifier, text, "right" if number == EXPECTED else "wrong")


def make_cases(verifier: str, count: int, num_deadly: int, draw: random.Random) -> list[Case]:
    """`count` cases in random order, of which `num_deadly` end or hold up their process."""
    cases = [make_case(verifier, draw) for _ in range(count)]
    for place in draw.sample(range(count), num_deadly if verifier in ("user", "math_verify") else 0):
        if verifier == "math_verify":
            cases[place] = Case(verifier, draw.choice(BOMBS), "answered")
        elif draw.random() < 0.5:
            cases[place] = Case(verifier, draw.choice(SLOW), "slow")
        else:
            cases[place] = Case(verifier, draw.choice(FAILING), "fails")
    return cases
