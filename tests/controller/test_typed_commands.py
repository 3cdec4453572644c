"""A command of the controller names a method of the process's class, which editors and type checkers follow."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_layers import PACKAGE

MODULES = sorted((PACKAGE / "controller").rglob("*.py"))
SENDERS = {"call", "ask", "call_all", "_replay", "_learners"}
"""Methods that take a lambda which picks the method to run in a process."""
FEWEST_COMMANDS = 25


def called_by_name(tree: ast.AST) -> list[str]:
    """Calls of what `getattr` returns for a name that isn't written there."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Call)
        and ast.unparse(node.func.func) in ("getattr", "methodcaller", "operator.methodcaller")
        and not isinstance(node.func.args[-1], ast.Constant)
    ]


def picks(tree: ast.AST) -> Iterator[ast.Lambda]:
    """The lambdas that travel to a process."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = [node.func, *node.args] if ast.unparse(node.func) == "partial" else [node.func]
            if any(isinstance(one, ast.Attribute) and one.attr in SENDERS for one in named):
                yield from (argument for argument in node.args if isinstance(argument, ast.Lambda))


def is_method_of_its_argument(pick: ast.Lambda) -> bool:
    [argument] = pick.args.args
    body = pick.body
    return isinstance(body, ast.Attribute) and isinstance(body.value, ast.Name) and body.value.id == argument.arg


def test_no_method_is_called_by_its_name_in_a_string() -> None:
    for path in MODULES:
        assert called_by_name(ast.parse(path.read_text())) == [], path


def test_what_travels_to_a_process_holds_nothing_of_the_controller() -> None:
    found = [pick for path in MODULES for pick in picks(ast.parse(path.read_text()))]
    assert len(found) >= FEWEST_COMMANDS
    assert [ast.unparse(pick) for pick in found if not is_method_of_its_argument(pick)] == []


@pytest.mark.parametrize(
    ("code", "is_fine"),
    [
        ("replay.ask(lambda replay: replay.roll_back, step)", True),
        ("partial(replay.ask, lambda replay: replay.evaluate)", True),
        ("replay.ask(lambda replay: replay.roll_back(self.step))", False),
        ("replay.ask(lambda replay: self.roll_back)", False),
        ("partial(replay.ask, lambda replay: self.evaluate)", False),
    ],
)
def test_a_lambda_that_uses_more_than_its_argument_is_found(code: str, is_fine: bool) -> None:
    [pick] = picks(ast.parse(code))
    assert is_method_of_its_argument(pick) == is_fine


def test_a_call_by_name_is_found() -> None:
    assert called_by_name(ast.parse("getattr(self.role, command)(*args)")) == ["getattr(self.role, command)(*args)"]
    assert called_by_name(ast.parse("getattr(torch, dtype)")) == []
