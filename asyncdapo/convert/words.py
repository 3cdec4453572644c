"""Words of a shell: quotes, variables and arithmetic, read and never run.

What only a running shell knows (`$(…)`, environment variables, `${x%.*}`) makes a word unknown, with the reason;
nothing is guessed. Only HOME is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from asyncdapo.convert.arithmetic import arithmetic
from asyncdapo.errors import UserError

MAX_VALUE = 1 << 16
"""Most characters of a value: a script could double one in every line."""
MAX_DEPTH = 20
"""Most levels of `${a:-${b:-…}}`, and of `eval` within `eval`."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SPECIAL = re.compile(r"[@*#?$!0-9-]")
"""Variables that a shell sets itself."""


@dataclass(frozen=True)
class Word:
    """A word without its quotes and with its variables expanded; `unknown` says why that wasn't possible."""

    text: str
    unknown: str = ""
    note: str = ""
    """What is doubtful about it."""

    def __add__(self, other: Word) -> Word:
        text = self.text + other.text
        too_long = "it grows without end" if len(text) > MAX_VALUE else ""
        return Word(text[:MAX_VALUE], self.unknown or other.unknown or too_long, self.note or other.note)


class Words:
    """Reads a text once, character by character; `at` is the current position."""

    def __init__(self, text: str, variables: dict[str, Word | list[Word]], depth: int) -> None:
        self.text, self.variables, self.depth = text, variables, depth
        self.at = 0

    def line(self, at: int) -> int:
        """Number of the line, from 1."""
        return self.text.count("\n", 0, at) + 1

    def value(self) -> Word:
        """The value after `NAME=`: one word, never split."""
        return _joined(part for part, _ in self._parts())

    def word(self) -> list[Word]:
        """The next word; several where an unquoted variable holds several, none where it holds none."""
        words: list[Word] = []
        current: Word | None = None
        for part, splits in self._parts():
            pieces = [part]
            if splits and not part.unknown:
                pieces = [replace(part, text=text) for text in part.text.split()]
                if part.text[:1].isspace() and current is not None:
                    words, current = [*words, current], None
            for index, piece in enumerate(pieces):
                if index and current is not None:
                    words, current = [*words, current], None
                current = piece if current is None else current + piece
        return words if current is None else [*words, current]

    def _parts(self) -> Iterator[tuple[Word, bool]]:
        """The parts of a word, and whether the shell would split each at its blanks."""
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in " \t\r\n;&|()<>":
            here = self.text[self.at]
            if here == "\\":
                following = self.text[self.at + 1 : self.at + 2]
                self.at += 2
                if following != "\n":
                    yield Word(following), False
            elif here == "'":
                yield Word(self._until("'")), False
            elif here == '"':
                yield from self._double_quoted()
            elif self.text.startswith("$'", self.at):
                self.at += 1
                yield Word(self._until("'")), False
            elif here in "$`":
                yield from self._separate(self._expansion(), splits=True)
            else:
                plain = re.compile(r"[^ \t\r\n;&|()<>\\'\"$`]+").match(self.text, self.at)
                assert plain  # everything else is handled above
                self.at = plain.end()
                ends = self.at == len(self.text) or self.text[self.at] in " \t\r\n;&|()<>"
                home = self.at - len(plain[0]) == start and (plain[0].startswith("~/") or (plain[0] == "~" and ends))
                yield Word(str(Path.home()) + plain[0][1:] if home else plain[0]), False

    def _until(self, quote: str) -> str:
        end = self.text.find(quote, self.at + 1)
        if end < 0:
            raise UserError(f"line {self.line(self.at)}: a quote {quote} that isn't closed")
        inside = self.text[self.at + 1 : end]
        self.at = end + 1
        return inside

    def _double_quoted(self) -> Iterator[tuple[Word, bool]]:
        start = self.at
        self.at += 1
        yield Word(""), False
        while self.at < len(self.text):
            here = self.text[self.at]
            if here == '"':
                self.at += 1
                return
            if here == "\\":
                following = self.text[self.at + 1 : self.at + 2]
                self.at += 2
                if following != "\n":
                    yield Word(following if following in '"\\$`' else "\\" + following), False
            elif here in "$`":
                yield from self._separate(self._expansion(), splits=False)
            else:
                plain = re.compile(r'[^"\\$`]+').match(self.text, self.at)
                assert plain  # everything else is handled above
                self.at = plain.end()
                yield Word(plain[0]), False
        raise UserError(f"line {self.line(start)}: a quote \" that isn't closed")

    @staticmethod
    def _separate(parts: list[Word], splits: bool) -> Iterator[tuple[Word, bool]]:
        """`"${array[@]}"` is one word for each of its items."""
        for index, part in enumerate(parts):
            if index:
                yield Word(" "), True
            yield part, splits

    # ----------------------------------------------------------------------------------------------------- expansions

    def _expansion(self) -> list[Word]:
        """The expansion of a `$…` or a backtick."""
        if self.text[self.at] == "`":
            return [_command_output(self._until("`"))]
        if self.text.startswith("$((", self.at):
            inside = self._balanced("$((", "(", ")", closing=2)
            return [self._arithmetic(inside)]
        if self.text.startswith("$(", self.at):
            return [_command_output(self._balanced("$(", "(", ")", closing=1))]
        if self.text.startswith("${", self.at):
            return self._braced(self._balanced("${", "{", "}", closing=1))
        if name := NAME.match(self.text, self.at + 1) or SPECIAL.match(self.text, self.at + 1):
            self.at = name.end()
            return self._variable(name[0])
        self.at += 1
        return [Word("$")]

    def _balanced(self, opening: str, up: str, down: str, closing: int) -> str:
        """The text between `opening` and its end, with quotes inside as in a shell."""
        start = self.at
        self.at += len(opening)
        begin, depth = self.at, closing
        while self.at < len(self.text):
            here = self.text[self.at]
            if here == "\\":
                self.at += 1
            elif here == "'" and up != "{":
                self._until("'")
                continue
            elif here in up + down:
                depth += 1 if here == up else -1
                if depth == 0:
                    self.at += 1
                    return self.text[begin : self.at - closing]
            self.at += 1
        raise UserError(f"line {self.line(start)}: {opening} that isn't closed")

    def _variable(self, name: str) -> list[Word]:
        if name in ("@", "*"):
            return []  # the script's arguments: those given to `convert` replace them
        value = self.variables.get(name)
        if value is None:
            why = f"argument {name} of the script isn't known" if name.isdigit() else f"the script doesn't set {name}"
            return [Word(f"${{{name}}}", why)]
        return value[:1] if isinstance(value, list) else [value]

    def _arithmetic(self, inside: str) -> Word:
        notes: set[str] = set()

        def value_of(name: str) -> str:
            word = self._variable(name)[0]
            if word.unknown:
                raise ValueError(word.unknown)
            notes.update([word.note] if word.note else [])
            return word.text

        try:
            return Word(str(arithmetic(inside, value_of)), note=next(iter(notes), ""))
        except (ValueError, ZeroDivisionError, RecursionError) as error:
            return Word(f"$(({inside}))", f"$(({inside})) isn't understood: {error}")

    def _braced(self, inside: str) -> list[Word]:
        """`${…}`."""
        found = NAME.match(inside) or re.match(r"\d+|[@*]", inside)
        if not found:
            return [Word("${" + inside + "}", f"${{{inside}}} isn't understood")]
        name, rest = found[0], inside[found.end() :]
        value = self.variables.get(name)
        if rest in ("[@]", "[*]"):
            if value is None:
                return self._variable(name)
            return value if isinstance(value, list) else [value]
        if not rest or name in ("@", "*"):
            return self._variable(name)
        if default := re.match(r":?([-=+?])", rest):
            return self._with_default(name, value, rest.startswith(":"), default[1], rest[default.end() :])
        if rest in (",,", "^^") and isinstance(value, Word):
            return [replace(value, text=value.text.lower() if rest == ",," else value.text.upper())]
        return [Word("${" + inside + "}", f"${{{inside}}} isn't understood")]

    def _with_default(
        self, name: str, value: Word | list[Word] | None, empty_counts: bool, sign: str, text: str
    ) -> list[Word]:
        """`${x:-text}`, `${x:=text}`, `${x:+text}`, `${x:?text}`."""
        is_set = bool(value) and not (empty_counts and isinstance(value, Word) and not value.text)
        if sign == "+":
            return [self._inner(text)] if is_set else []
        if is_set or sign == "?":
            return self._variable(name)
        made = self._inner(text)
        if sign == "=":
            self.variables[name] = made
        return [made]

    def _inner(self, text: str) -> Word:
        """The text of a default, which may hold quotes and variables itself."""
        if self.depth >= MAX_DEPTH:
            return Word(text, "it is nested too deeply")
        if not text:
            return Word("")
        reader = Words('"' + text.replace('"', "") + '"', self.variables, self.depth + 1)
        return _joined(part for part, _ in reader._parts())


def _joined(parts: Iterable[Word]) -> Word:
    return sum(parts, Word(""))


def _command_output(inside: str) -> Word:
    return Word(f"$({inside})", "it is the output of a command, and no command is run")
