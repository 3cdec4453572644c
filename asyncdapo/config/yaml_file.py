"""One YAML file of a user: its values, and the place of each key.

In: a path. Out: a tree, and a place such as `mine.yaml, line 4, column 3` for each dotted key; or UserError with line,
column, cause and the right form. Does not own: which keys there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from asyncdapo.errors import UserError

Spot = tuple[int, int]
"""Line and column, from 0 as the parser counts."""
COMMENT = re.compile(r"(^|\s+)#.*")
KEY_WITHOUT_COLON = re.compile(r"\s*(\w+)(?:$|\s+|:(?=\S))(\S.*)?$")
KEY_AND_VALUE = re.compile(r"\s*([\w.]+):\s+(\S.*)$")


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of the file, interpolations unresolved, and their places."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory (give a YAML file, or the name of a config)") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: a character that isn't UTF-8 (save the file as UTF-8)") from error
    try:
        root = _composed(text)
    except yaml.MarkedYAMLError as error:
        where, problem, fix = _diagnosis(text.splitlines(), error)
        raise UserError(f"{_place(path, where)}: {problem} ({fix})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if root is None:
        return {}, {}
    if not isinstance(root, yaml.MappingNode):
        problem, fix = "has no sections", "write `run:`, and its keys below, each indented by two spaces"
        raise UserError(f"{_place(path, _spot(root.start_mark))}: {problem} ({fix})")
    places: dict[str, str] = {}
    for key, node in _keys(root):
        place = _place(path, _spot(node.start_mark))
        if key in places:
            fix = "keep one of the two" if "." in key else "write all keys of the section under one of the two"
            raise UserError(f"{place}: {key} is already at {places[key]} ({fix})")
        places[key] = place
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text))), places


def _composed(text: str) -> yaml.Node | None:
    """By libyaml where it is there, fifteen times as fast. A text with tabs, of which it lets some pass, and one with
    mistakes, for which it has other words than `_diagnosis` knows, are for the other parser."""
    fast = yaml.SafeLoader if "\t" in text else getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.compose(text, Loader=fast)
    except yaml.YAMLError:
        return yaml.compose(text, Loader=yaml.SafeLoader)


def _keys(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key
        if isinstance(value, yaml.MappingNode):
            yield from _keys(value, f"{name}.")


def _spot(mark: yaml.Mark) -> Spot:
    return mark.line, mark.column


def _place(path: Path, spot: Spot) -> str:
    return f"{path}, line {spot[0] + 1}, column {spot[1] + 1}"


def _diagnosis(lines: list[str], error: yaml.MarkedYAMLError) -> tuple[Spot, str, str]:
    """Place, cause and right form. The parser names the place where it gave up; the mistake may be before it."""
    lines = [*(COMMENT.sub("", line) for line in lines), ""]  # the end of the file is a place as well
    mark, problem = error.problem_mark, error.problem or ""
    context = error.context_mark or mark
    assert mark is not None, "the parser says where it gave up"
    assert context is not None
    here, opened = _spot(mark), _spot(context)
    if "'\\t'" in problem:
        return here, "a tab, where YAML takes spaces only", "indent the keys of a section by two spaces"
    quote = opened if error.context == "while scanning a quoted scalar" else _open_quote(lines[: mark.line])
    if quote:
        line = lines[quote[0]]
        return quote, "a quote that isn't closed", f"write `{line.strip()}{line[quote[1]]}`"
    if (error.context or "").startswith("while parsing a flow"):
        return opened, "a bracket that isn't closed", "close it, or put the text in quotes"
    if "cannot start any token" in problem:
        word = re.split(r"[\s,}\]]", lines[mark.line][mark.column :], maxsplit=1)[0]
        return here, f"a value can't begin with {word[0]}", f"put it in quotes: `{_quoted(word)}`"
    return _in_line(lines, opened if "could not find expected ':'" in problem else here, problem)


def _in_line(lines: list[str], here: Spot, problem: str) -> tuple[Spot, str, str]:
    """What is wrong with a line of keys and values, or with the line above it."""
    number = here[0]
    for candidate in (number, number - 1) if number else (number,):
        if right := with_colon(lines[candidate]):
            column = len(lines[candidate]) - len(lines[candidate].lstrip())
            return (candidate, column), "a key without a colon and a space behind it", f"write `{right}`"
    found = KEY_AND_VALUE.match(lines[number])
    if lines[number].lstrip().startswith("- ") and not found:
        return here, "an entry of a list among keys", "a key begins without `- `"
    if not found:
        return here, problem, "text with special characters stands in quotes"
    if ": " in found[2] or found[2][0] in "{[*&!|>\"'":
        return here, "a value that isn't plain text", f"put it in quotes: `{found[1]}: {_quoted(found[2])}`"
    problem = "a key that is indented unlike the others of its section, or below a key that has a value"
    return (number, found.start(1)), problem, "the keys of a section are indented by two spaces"


def with_colon(line: str) -> str:
    """The right form of `steps 3`, `steps:3` and `run`. Empty for other lines."""
    found = KEY_WITHOUT_COLON.match(line)
    return f"{found[1]}: {found[2] or ''}".rstrip() if found else ""


def _open_quote(lines: list[str]) -> Spot | None:
    """The place of a double quote that begins a value and that its line doesn't close."""
    for number, line in enumerate(lines):
        found = KEY_AND_VALUE.match(line)
        if found and found[2].startswith('"') and found[2].count('"') % 2:
            return number, found.start(2)
    return None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
