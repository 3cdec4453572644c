"""The bash blocks of the pages, as a reader would paste them.

In: README.md, docs/*.md, launchers/README.md, and the comments of configs/*.yaml, whose commands are indented. Out:
blocks with their page and line, in order. A comment `<!-- exit code: 2 -->` right above a block says how it ends where
that isn't 0. Of README.md the commands within a sentence count, too; `asyncdapo data prepare` without an argument is a
name.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder, pattern in ((".", "README.md"), ("docs", "*.md"), ("launchers", "*.md"), ("configs", "*.yaml"))
    for path in (ROOT / folder).glob(pattern)
)
LANGUAGES = ("bash", "sh", "shell", "console")
IN_A_COMMENT = re.compile(r"^#   (\S.*?)(?:   +.*)?$")
"""A command in a config, and what it does, far to the right."""
IN_A_SENTENCE = re.compile(r"`((?:\.venv/bin/)?(?:asyncdapo|python) [^`]+)`")
NAME = re.compile(r"asyncdapo [a-z]+(?: prepare)?")
EXIT_CODE = re.compile(r"<!-- exit code: (\d+) -->")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    text: str
    exit_code: int


def blocks_of(page: str) -> list[Block]:
    """Of a page of the repository, or of a file elsewhere by its whole path."""
    lines = (ROOT / page).read_text().splitlines()
    if page.endswith(".yaml"):
        commands = ((number, IN_A_COMMENT.match(line)) for number, line in enumerate(lines, 1))
        return [Block(page, number, f"{command[1]}\n", 0) for number, command in commands if command]
    return list(_blocks(page, lines))


def python_cells_of(page: str) -> list[str]:
    """The Python blocks of a page that is read like a notebook."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    above, start = "", 0
    for number, line in enumerate(lines):
        word = line.strip()
        if start and word == "```":
            code = EXIT_CODE.search(above)
            text = textwrap.dedent("\n".join(lines[start:number]) + "\n")
            yield Block(page, start + 1, text, int(code[1]) if code else 0)
            start = 0
        elif not start and word.startswith("```") and word.removeprefix("```") in LANGUAGES:
            start = number + 1
        elif not start:
            above = line
            commands = IN_A_SENTENCE.findall(line) if page == "README.md" else []
            yield from (Block(page, number + 1, f"{text}\n", 0) for text in commands if not NAME.fullmatch(text))
