"""Verifier `dapo`: right if what follows the last `Answer:` equals the expected answer, both normalised.

Only the last 300 characters of a response count, and of these only the rest of the line after the marker. The rule is
the one that DAPO was trained with (Yu et al., 2025). Its normalisation comes from Minerva (Lewkowycz et al., 2022,
arXiv 2206.14858, app. D.1): it removes unit words and LaTeX spelling variants. It compares strings: `0.5` is not `1/2`.

Time is linear in the length of the text: a response is cut before it is searched, and spans of an expected answer are
found by searching for their ends, without backtracking.
"""

from __future__ import annotations

import re

NUM_CHARS = 300
"""Characters at the end of a response that are searched."""
MARKER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
INVALID = "[INVALID]"
"""Prediction of a response without the marker."""

REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
DELETED = (
    *"square ways integers dollars mph inches hours km units".split(),
    r"\ldots",
    *"sue points feet minutes digits cents degrees cm gm pounds meters meals edges students".split(),
    *"childrentickets multiples".split(),
    r"\text{s}",
    r"\text{.}",
    "\\text{\ns}",
    r"\text{}^2",
    r"\text{}^3",
    "\\text{\n}",
    r"\text{}",
    r"\mathrm{th}",
    r"^\circ",
    r"^{\circ}",
    r"\;",
    r",\!",
    "{,}",
    '"',
    r"\dots",
)
"""The order matters: text that a deletion joins may be deleted by a later one."""

FRAC = re.compile(r"frac([^{])(.)")
SQRT = re.compile(r"sqrt([^{])")


def verify(text: str, answer: str) -> dict[str, float | str | None]:
    """`acc` 1.0 for a right text, 0.0 for a wrong one; `pred`, what it answers."""
    given = extract(text)
    return {"acc": float(given == normalise(answer)), "pred": None if given == INVALID else given}


def extract(text: str) -> str:
    """The response's answer, normalised; `[INVALID]` without the marker."""
    found = MARKER.findall(text[-NUM_CHARS:])
    return normalise(found[-1]) if found else INVALID


def normalise(answer: str) -> str:
    """The same string for the usual spellings of an answer."""
    answer = answer.rpartition("=")[2]
    for old, new in REPLACED:
        answer = answer.replace(old, new)
    for expression in DELETED:
        answer = answer.replace(expression, "")
    answer = "\n".join(_unwrap(line) for line in answer.split("\n"))
    answer = FRAC.sub(r"frac{\1}{\2}", answer)
    answer = SQRT.sub(r"sqrt{\1}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


def _unwrap(line: str) -> str:
    """The line's first `$…$` alone, if it has one, without the commands that only format their argument."""
    before_first = line.split("$", 2)
    if len(before_first) == 3:
        line = f"${before_first[1]}$"
    for command in (r"\text{", r"\textbf{", r"\overline{"):
        line = _without(command, line)
    return _without_outer(r"\boxed{", line)


def _without(command: str, line: str) -> str:
    """Every `command…}`, up to the nearest brace, replaced by what it holds."""
    parts, at = [], 0
    while (start := line.find(command, at)) >= 0 and (end := line.find("}", start + len(command))) >= 0:
        parts += [line[at:start], line[start + len(command) : end]]
        at = end + 1
    return "".join([*parts, line[at:]])


def _without_outer(command: str, line: str) -> str:
    """The first `command…}`, up to the last brace of the line, replaced by what it holds."""
    before, found, rest = line.partition(command)
    inside, brace, after = rest.rpartition("}")
    return f"{before}{inside}{after}" if found and brace else line
