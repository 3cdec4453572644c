"""Whole objects: an object has every attribute from its constructor on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "asyncdapo"
MODULES = sorted(PACKAGE.rglob("*.py"))

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def classes(paths: list[Path]) -> dict[str, list[ast.ClassDef]]:
    """Every class by its name. Two stages may use one name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def methods_of(owner: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Those that have the object as their first argument."""
    for node in owner.body:
        if isinstance(node, FUNCTIONS):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            if not decorators & {"staticmethod", "classmethod"}:
                yield node


def set_in(method: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names that the method assigns on its object, in functions inside of it too."""
    me = [*method.args.posonlyargs, *method.args.args][0].arg
    return {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == me
    }


def made_with(owner: ast.ClassDef, known: dict[str, list[ast.ClassDef]]) -> set[str]:
    """Attributes that an object has when its constructor returns: fields, and what `__init__` sets, bases included."""
    names = set().union(*(set_in(method) for method in methods_of(owner) if method.name == "__init__"))
    for node in owner.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and (node.value or owner.decorator_list):
            names.add(node.target.id)
    for base in owner.bases:
        for parent in known.get(ast.unparse(base).split(".")[-1], []):
            names |= made_with(parent, known)
    return names


def set_late(owner: ast.ClassDef, known: dict[str, list[ast.ClassDef]]) -> set[str]:
    later = (set_in(method) for method in methods_of(owner) if method.name != "__init__")
    return set().union(*later) - made_with(owner, known)


def test_no_attribute_is_first_set_outside_the_constructor() -> None:
    known = classes(MODULES)
    late = {(owner.name, name) for owners in known.values() for owner in owners for name in set_late(owner, known)}
    assert late == set()


@pytest.mark.parametrize(
    ("code", "late"),
    [
        ("class A:\n    def start(self):\n        self.x = 1", {"x"}),
        ("class A:\n    x: int\n    def start(self):\n        self.x = 1", {"x"}),
        ("class A:\n    async def start(self):\n        async with f() as self.x:\n            pass", {"x"}),
        ("class A:\n    def __init__(self):\n        self.x = None\n    def start(self):\n        self.x = 1", set()),
        ("@dataclass\nclass A:\n    x: int\n    def start(self):\n        self.x = 1", set()),
    ],
)
def test_an_attribute_counts_as_late_unless_the_constructor_or_a_field_makes_it(code: str, late: set[str]) -> None:
    [owner] = ast.parse(code).body
    assert isinstance(owner, ast.ClassDef)
    assert set_late(owner, {}) == late
