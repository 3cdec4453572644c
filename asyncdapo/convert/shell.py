"""Reads shell scripts without running anything: the text of a script in, the commands that it would start out.

It understands what training scripts use: assignments (`export`, arrays), quotes, variables and arithmetic (words.py),
continuation lines, comments, here-documents, and `eval` of these. Branches and loops are read as if each were taken
once, with a note on each variable that they assign.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from asyncdapo.convert.words import MAX_DEPTH, Word, Words
from asyncdapo.errors import UserError

MAX_SCRIPT = 1 << 20
ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?=)")
DECLARES = ("export", "declare", "typeset", "local", "readonly")
OPENS = ("if", "for", "while", "until", "case", "select")
CLOSES = ("fi", "done", "esac")
BETWEEN = ("then", "else", "elif", "do", "in", "!", "time", "{", "}", "function")


@dataclass(frozen=True)
class Command:
    """One command: its words, and the assignments in front of it (`A=1 python …`)."""

    words: tuple[Word, ...]
    line: int
    assigned: dict[str, Word] = field(default_factory=dict)


@dataclass
class Script:
    """The commands and variables of a script."""

    commands: list[Command] = field(default_factory=list)
    variables: dict[str, Word | list[Word]] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    """Names of the variables that the commands inherit."""


def read_script(text: str) -> Script:
    """Every command of the script, in order. Raises UserError for a text that isn't a shell script."""
    if len(text) > MAX_SCRIPT:
        raise UserError(f"a script of {len(text)} characters; at most {MAX_SCRIPT} are read")
    script = Script(variables={"HOME": Word(str(Path.home()))})
    _Reader(text, script, depth=0).run()
    return script


class _Reader(Words):
    """Reads the commands of a text."""

    def __init__(self, text: str, script: Script, depth: int) -> None:
        super().__init__(text, script.variables, depth)
        self.script = script
        self.branches = 0
        self.here_documents: list[str] = []

    def run(self) -> None:
        words: list[Word] = []
        assigned: dict[str, Word] = {}
        line = 1
        while self.at < len(self.text):
            here = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self.at += 2
            elif here in " \t\r":
                self.at += 1
            elif here == "#":
                self._skip_to_line_end()
            elif here in "\n;&|()":
                self._end(words, assigned, line)
                words, assigned = [], {}
                self.at += 1
                if here == "\n":
                    self._skip_here_documents()
            elif here in "<>" or re.match(r"\d+[<>]", self.text[self.at : self.at + 4]):
                self._redirection()
            else:
                if not words and not assigned:
                    line = self.line(self.at)
                if not self._assignment(words, assigned):
                    words += self._keyword(words, self.word())
        self._end(words, assigned, line)

    def _keyword(self, words: list[Word], new: list[Word]) -> list[Word]:
        """The new words, without a keyword (`if`, `do`, …) at the beginning of a command."""
        if words or len(new) != 1 or new[0].text not in (*OPENS, *CLOSES, *BETWEEN):
            return new
        self.branches += (new[0].text in OPENS) - (new[0].text in CLOSES and self.branches > 0)
        return []

    def _end(self, words: list[Word], assigned: dict[str, Word], line: int) -> None:
        """A command is complete. Assignments without a command hold for the rest of the script."""
        if not words:
            self.variables.update(assigned)
            return
        if words[0].text == "eval":  # unknown words stay unknown: their text is the unexpanded one
            if self.depth < MAX_DEPTH:
                _Reader(" ".join(word.text for word in words[1:]), self.script, self.depth + 1).run()
            return
        if words[0].text == "export":
            self.script.exported |= {word.text for word in words[1:]}
            return
        self.script.commands.append(Command(tuple(words), line, assigned))

    def _assignment(self, words: list[Word], assigned: dict[str, Word]) -> bool:
        """Read `NAME=…` at the beginning of a command or after `export`; False if there is none."""
        found = ASSIGNMENT.match(self.text, self.at)
        declares = bool(words) and words[0].text in DECLARES
        if not found or (words and not declares):
            return False
        self.at = found.end()
        name, adds = found[1], found[2] == "+="
        before = self.variables.get(name)
        if self.text.startswith("(", self.at):
            old = before if adds and isinstance(before, list) else []
            self.variables[name] = old + [self._doubtful(name, word) for word in self._array()]
            return True
        value = self.value()
        if adds and isinstance(before, Word):
            value = before + value
        value = self._doubtful(name, value)
        if declares:
            self.variables[name] = value
            self.script.exported |= {name} if words[0].text == "export" else set()
        else:
            assigned[name] = value
        return True

    def _doubtful(self, name: str, word: Word) -> Word:
        """The word, with a note if it is assigned in a branch or loop."""
        note = f"line {self.line(self.at)}: {name} is assigned in a branch or loop, read as if that were taken"
        return replace(word, note=note) if self.branches and not word.unknown else word

    def _array(self) -> list[Word]:
        self.at += 1
        items: list[Word] = []
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "#":
                self._skip_to_line_end()
            elif self.text[self.at] in " \t\r\n;&|<>":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            else:
                items += self.word()
        self.at += 1
        return items

    def _skip_to_line_end(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _redirection(self) -> None:
        """Skip `> file`, `2>&1`, `<<EOF`."""
        found = re.compile(r"\d*(<<<|<<-?|>>|>&|<&|[<>]\(?|[<>])\s*").match(self.text, self.at)
        assert found  # the caller saw one
        self.at = found.end()
        if found[1] in ("<<", "<<-"):
            self.here_documents.append("".join(word.text for word in self.word()))
        elif self.at < len(self.text) and self.text[self.at] not in "\n;|()":
            self.word()

    def _skip_here_documents(self) -> None:
        for mark in self.here_documents:
            while self.at < len(self.text):
                start = self.at
                self._skip_to_line_end()
                line, self.at = self.text[start : self.at].strip(), self.at + 1
                if line == mark:
                    break
        self.here_documents = []
