"""Walks through the code, as a reader takes them with "go to definition": which files lie between two functions.

In: the sources. Out: for a walk, the functions on some way from its entry to its exit. A way follows each name that a
function uses to what it names: imports, methods by annotated types and by what a constructor assigns, implementations
of a Protocol, and from a record (a message, an event) that is made to where one is matched. A method of a value whose
type isn't told is followed where only one class has it, and no container of Python's. Runs nothing. Print both:
`python -m tests.walks`.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WALKS = {
    "a scored group becomes a gradient": (
        ("rollout.worker.RolloutWorker._complete", "rollout.groups.build_group"),
        ("replay.server.workers.Workers.hear", "replay.server.headers.Headers.batch"),
        ("controller.roles.learner.LearnerProcess.take_batch", "learner.batches.feed.read_share"),
        ("controller.roles.learner.LearnerProcess._prepare", "learner.batches.samples.rows_by_update"),
        ("controller.roles.learner.LearnerProcess.train_step", "learner.step.gradient._backward"),
    ),
    "weights come to an engine": (
        ("controller.fleet.weights.publishing.Publishing.publish", "transport.process_group.ProcessGroup.broadcast"),
        (
            "controller.fleet.weights.publishing.Publishing.publish",
            "rollout.torch_engine.torch_engine.TorchEngine.load_weights",
        ),
    ),
}
"""Entry and exit of each leg. Between two legs a message crosses to another process, or a result goes back to whoever
asked for it: no name leads there."""

EVENTS = "asyncdapo.replay.core.events"
"""Records that stay inside of a process: who makes one calls those that match it."""
Scope = ast.FunctionDef | ast.AsyncFunctionDef
Types = frozenset[str]
"""Names of our classes. A container is what it holds: `dict[int, Job]` counts as `Job`."""
NONE: Types = frozenset()
OF_CONTAINERS = {name for container in (dict, list, set, str) for name in dir(container)}
"""Methods that not only classes of ours have."""


@dataclass
class Class:
    """What a reader knows of a class."""

    bases: list[str]
    methods: dict[str, Scope] = field(default_factory=dict)
    annotations: dict[str, ast.expr] = field(default_factory=dict)
    is_protocol: bool = False


class Code:
    """The definitions of a package, by dotted name."""

    def __init__(self, root: Path, package: str) -> None:
        self.names: dict[str, dict[str, str]] = {}
        """What each name of a module stands for."""
        self.functions: dict[str, Scope] = {}
        self.classes: dict[str, Class] = {}
        self.matched: dict[str, set[str]] = defaultdict(set)
        """Functions that match a record of the class."""
        self._types: dict[tuple[str, str], Types] = {}
        for path in sorted((root / package).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            self._define(module, ast.parse(path.read_text()))
        self._of_method: dict[str, list[str]] = defaultdict(list)
        for name, cls in self.classes.items():
            for method in cls.methods:
                self._of_method[method].append(name)
        self.edges = {name: set(self._uses(name, node)) for name, node in self.functions.items()}
        for name, made in [(name, used) for name, used in self.edges.items()]:
            events = (record for record in made if self.module_of(record) == EVENTS)
            self.edges[name] = made | {reader for record in events for reader in self.matched[record]}

    # --------------------------------------------------------------------------------------------------- definitions

    def _define(self, module: str, tree: ast.Module) -> None:
        names = self.names[module] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in tree.body:
            if isinstance(node, Scope):
                names[node.name] = f"{module}.{node.name}"
                self.functions[names[node.name]] = node
            elif isinstance(node, ast.ClassDef):
                names[node.name] = f"{module}.{node.name}"
                self._define_class(module, node)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = f"{module}.{node.targets[0].id}"

    def _define_class(self, module: str, node: ast.ClassDef) -> None:
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        given = [base.id for base in bases if isinstance(base, ast.Name)]
        cls = self.classes[f"{module}.{node.name}"] = Class([self.names[module].get(base, base) for base in given])
        cls.is_protocol = "Protocol" in given
        for part in node.body:
            if isinstance(part, Scope):
                cls.methods[part.name] = part
                self.functions[f"{module}.{node.name}.{part.name}"] = part
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                cls.annotations[part.target.id] = part.annotation

    # --------------------------------------------------------------------------------------------------------- types

    def module_of(self, name: str) -> str:
        while name not in self.names:
            name = name.rpartition(".")[0]
        return name

    def _annotated(self, module: str, annotation: ast.expr | None) -> Types:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        used = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)] if annotation else []
        return frozenset(self.names[module].get(name, "") for name in used) & self.classes.keys()

    def _lineage(self, cls: str) -> Iterator[str]:
        """The class, those that it is made of, and those that stand behind a Protocol."""
        if cls in self.classes:
            yield cls
            for base in self.classes[cls].bases:
                yield from self._lineage(base)
            if self.classes[cls].is_protocol:
                wanted = {name for name in self.classes[cls].methods if not name.startswith("__")}
                for name, other in self.classes.items():
                    if wanted and not other.is_protocol and wanted <= other.methods.keys():
                        yield name

    def _attribute(self, cls: str, name: str) -> Types:
        key = (cls, name)
        if key not in self._types:
            self._types[key] = NONE  # an attribute that is made of itself
            self._types[key] = frozenset().union(*(self._own_attribute(one, name) for one in self._lineage(cls)))
        return self._types[key]

    def _own_attribute(self, cls: str, name: str) -> Types:
        module, found = self.module_of(cls), self.classes[cls]
        if name in found.annotations:
            return self._annotated(module, found.annotations[name])
        if name in found.methods:
            return self._annotated(module, found.methods[name].returns)
        types = NONE
        for method, node in found.methods.items():
            for part in _parts(node):
                targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
                for target, value in _pairs(targets, getattr(part, "value", None)):
                    if isinstance(target, ast.Attribute) and target.attr == name and _is_self(target.value):
                        types |= self._annotated(module, getattr(part, "annotation", None))
                        types |= self._type(value, f"{cls}.{method}", self._locals(f"{cls}.{method}", node))
        return types

    def _locals(self, function: str, node: Scope) -> dict[str, Types]:
        """Types of parameters and of names that are assigned once or more."""
        module, owner = self.module_of(function), function.rpartition(".")[0]
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        types = {argument.arg: self._annotated(module, argument.annotation) for argument in arguments}
        if owner in self.classes and arguments:
            types[arguments[0].arg] = frozenset({owner})
        for part in _parts(node):
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                types[part.target.id] = self._annotated(module, part.annotation)
            elif isinstance(part, ast.Assign | ast.NamedExpr | ast.For | ast.comprehension | ast.withitem):
                targets, value = _assigned(part)
                for target, given in _pairs(targets, value):
                    if isinstance(target, ast.Name):
                        types[target.id] = types.get(target.id, NONE) | self._type(given, function, types)
            elif isinstance(part, ast.MatchAs) and part.name and isinstance(part.pattern, ast.MatchClass):
                types[part.name] = self._annotated(module, part.pattern.cls)
        return types

    def _type(self, node: ast.expr | None, function: str, known: Mapping[str, Types]) -> Types:
        match node:
            case ast.Name(id=name):
                target = self.names[self.module_of(function)].get(name, "")
                return known.get(name) or (frozenset({target}) if target in self.classes else NONE)
            case ast.Attribute(value=value, attr=name):
                return frozenset().union(*(self._attribute(cls, name) for cls in self._type(value, function, known)))
            case ast.Call(func=ast.Name(id=name)) if (target := self._target(name, function)) in self.functions:
                return self._annotated(self.module_of(target), self.functions[target].returns)
            case ast.Call(func=func):
                return self._type(func, function, known)
            case ast.Await(value=value) | ast.Subscript(value=value) | ast.NamedExpr(value=value):
                return self._type(value, function, known)
            case ast.BoolOp(values=parts) | ast.Dict(values=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts):
                return frozenset().union(*(self._type(part, function, known) for part in parts))
            case ast.IfExp(body=body, orelse=other):
                return self._type(body, function, known) | self._type(other, function, known)
        return NONE

    def _named(self, node: ast.expr, function: str) -> str:
        """What a name stands for, also one in a module that is imported."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return f"{self._target(node.value.id, function)}.{node.attr}"
        return self._target(node.id, function) if isinstance(node, ast.Name) else ""

    def _target(self, name: str, function: str) -> str:
        return self.names[self.module_of(function)].get(name, "")

    # ---------------------------------------------------------------------------------------------------------- uses

    def _uses(self, function: str, node: Scope) -> Iterator[str]:
        known = self._locals(function, node)
        for part in _parts(node):
            match part:
                case ast.Call(func=made) if (cls := self._named(made, function)) in self.classes:
                    yield cls
                    yield from self._methods(cls, "__init__")
                case ast.Name(id=name, ctx=ast.Load()) if self._target(name, function) in self.functions:
                    yield self._target(name, function)
                case ast.Attribute(value=value, attr=name, ctx=ast.Load()):
                    yield from self._called(function, self._type(value, function, known), value, name)
                case ast.MatchClass(cls=record):
                    self.matched[self._named(record, function)].add(function)

    def _called(self, function: str, types: Types, value: ast.expr, name: str) -> Iterable[str]:
        if types:
            return [method for cls in types for method in self._methods(cls, name)]
        if isinstance(value, ast.Name) and value.id in self.names[self.module_of(function)]:
            target = f"{self._target(value.id, function)}.{name}"
            return [target] if target in self.functions else []
        owners = [] if name in OF_CONTAINERS else self._of_method.get(name, [])
        return [f"{owners[0]}.{name}"] if len(owners) == 1 else []

    def _methods(self, cls: str, name: str) -> list[str]:
        return [f"{one}.{name}" for one in self._lineage(cls) if name in self.classes[one].methods]


def walk(code: Code, entry: str, exit_: str) -> list[str]:
    """The functions on some way from one to the other, both included, sorted; none where there is no way."""
    back: dict[str, set[str]] = defaultdict(set)
    for name, used in code.edges.items():
        for other in used:
            back[other].add(name)
    return sorted(_reached(code.edges, f"asyncdapo.{entry}") & _reached(back, f"asyncdapo.{exit_}"))


def files_of(code: Code, legs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The modules on the way, and those with the modules that are looked into beside it: of all that is used there."""
    on_the_way = {name for leg in legs for name in walk(code, *leg)}
    beside = {used for name in on_the_way for used in code.edges[name] if used in code.functions}
    return sorted(set(map(code.module_of, on_the_way))), sorted(set(map(code.module_of, on_the_way | beside)))


def _reached(edges: Mapping[str, set[str]], start: str) -> set[str]:
    reached, todo = set(), [start]
    while todo:
        if (name := todo.pop()) not in reached:
            reached.add(name)
            todo += edges.get(name, ())
    return reached


@cache
def _parts(node: Scope) -> list[ast.AST]:
    """Of a function, which is asked for its parts once for every attribute of its class."""
    return list(ast.walk(node))


def _pairs(targets: Iterable[ast.expr | None], value: ast.expr | None) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    for target in targets:
        if isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
            yield from zip(target.elts, values, strict=False)
        elif target is not None:
            yield target, value


def _assigned(part: ast.AST) -> tuple[list[ast.expr | None], ast.expr | None]:
    match part:
        case ast.Assign(targets=targets, value=value):
            return list(targets), value
        case ast.NamedExpr(target=target, value=value):
            return [target], value
        case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
            return [target], value
        case ast.withitem(context_expr=value, optional_vars=target):
            return [target], value
    return [], None


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


if __name__ == "__main__":
    package = Code(ROOT, "asyncdapo")
    for title, legs in WALKS.items():
        files, seen = files_of(package, legs)
        print(f"{title}: {len(files)} files on the way, {len(seen)} with those beside it", *files, sep="\n    ")
        print("  beside:", *sorted(set(seen) - set(files)), sep="\n    ")
