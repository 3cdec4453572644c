"""The house rules that a reader relies on, read from the imports: who may know whom, and what stays out of files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "asyncdapo"
STAGES = {"prompts", "rollout", "environment", "reward", "replay", "learner", "weights", "metrics"}
LOWER = {
    "accounting",
    "algorithm",
    "child",
    "disk",
    "eval_messages",
    "errors",
    "faults",
    "messages",
    "model",
    "native",
    "plugins",
    "ranges",
    "records",
    "seeds",
    "shares",
    "transport",
}
ROOMS = {
    "controller": ("process", "roles", "checks", "fleet", "eval", "loop", "commands", "watch"),
    "learner": ("batches", "storage", "attention", "model", "step"),
    "replay": ("core", "ledger", "server"),
}
"""The sub-folders of a large stage, the lowest first: none imports one behind it."""
MOST_FILES = 12
"""Of a folder, `__init__.py` left out."""
IMPURE = {"time", "random", "asyncio", "threading", "os", "sqlite3", "socket", "zmq", "torch", "numpy", "pathlib"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Dotted names of our own modules that a file imports, type-checking ones included."""
    return {name for name in all_imports_of(path) if name.split(".")[0] == "asyncdapo"}


@cache
def all_imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def part_of(path: Path) -> str:
    """Folder of a module inside the package, or its own name at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_stage_knows_only_itself_and_the_layers_below() -> None:
    may_know = {
        "config": STAGES | LOWER | {"config"},
        "__init__": {"api"},
        "__main__": {"cli"},
        "convert": {"convert", "config", "errors"},
    }
    for path in MODULES:
        part = part_of(path)
        if part not in {"api", "cli", "controller"}:
            known = {name.split(".")[1] for name in imports_of(path) if "." in name}
            above = known - may_know.get(part, LOWER | {part} if part in STAGES else LOWER)
            assert not above, f"{path.relative_to(PACKAGE)} imports {above}"


def test_the_composed_config_is_made_of_the_stages_config_files_only() -> None:
    names = imports_of(PACKAGE / "config" / "config.py") - {
        "asyncdapo.errors",
        "asyncdapo.faults",
    }  # faults are of no stage
    names = {name for name in names if not name.startswith("asyncdapo.config.")}
    assert names
    assert all(name.endswith(".config") for name in names)


def test_the_pure_core_reaches_no_io() -> None:
    """Everything that `replay/core/state.py` imports, directly or not, is pure too."""
    reached, todo = set(), ["asyncdapo.replay.core.state"]
    while todo:
        name = todo.pop()
        reached.add(name)
        path = PACKAGE.parent / Path(*name.split(".")).with_suffix(".py")
        if name != "asyncdapo.messages":
            assert not {module.split(".")[0] for module in all_imports_of(path)} & IMPURE, name
        todo += imports_of(path) - reached
    assert reached >= {
        f"asyncdapo.replay.core.{name}" for name in "state queue admission staleness filter batch events".split()
    }
    others = {name for name in reached if not name.startswith("asyncdapo.replay.")}
    allowed = {"asyncdapo.messages", "asyncdapo.errors", "asyncdapo.ranges", "asyncdapo.seeds"}
    assert others <= allowed


def test_only_the_front_doors_import_the_controller() -> None:
    importers = {part_of(path) for path in MODULES if any("asyncdapo.controller" in n for n in imports_of(path))}
    assert importers == {"api", "cli", "controller"}


@pytest.mark.parametrize("stage", ROOMS)
def test_the_rooms_of_a_stage_are_in_order(stage: str) -> None:
    rooms = ROOMS[stage]
    assert {path.name for path in (PACKAGE / stage).iterdir() if (path / "__init__.py").exists()} == set(rooms)
    for path in (PACKAGE / stage).rglob("*.py"):
        parts = path.relative_to(PACKAGE / stage).parts
        allowed = rooms[: rooms.index(parts[0]) + 1] if len(parts) > 1 else ()
        names = [name.split(".") for name in imports_of(path) if name.startswith(f"asyncdapo.{stage}.")]
        above = {name[2] for name in names if name[2] in rooms} - set(allowed)
        assert not above, f"{path.relative_to(PACKAGE)} imports {above}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    arrows = {name: imports_of(path) & modules.keys() for name, path in modules.items()}
    while free := {name for name, reached in arrows.items() if not reached & arrows.keys()}:
        arrows = {name: reached for name, reached in arrows.items() if name not in free}
    assert not arrows, f"in a circle, or behind one: {sorted(arrows)}"


def test_a_folder_is_read_at_a_glance() -> None:
    counts = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_a_file_has_a_name_of_its_own_in_its_stage() -> None:
    names = Counter((part_of(path), path.name) for path in MODULES if path.name not in ("__init__.py", "config.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_packages_hold_no_code_of_their_own() -> None:
    """The front door alone says its names, which `api` defines."""
    front_door = PACKAGE / "__init__.py"
    assert all(path.read_text().strip() == "" for path in MODULES if path.name == "__init__.py" and path != front_door)
    imported, names = ast.parse(front_door.read_text()).body
    public = ["Run", "__version__", "launch", "load_config"]
    assert isinstance(imported, ast.ImportFrom)
    assert imported.module == "asyncdapo.api"
    assert [alias.name for alias in imported.names] == public
    assert ast.unparse(names) == f"__all__ = {public}"


@pytest.mark.parametrize("module", ["asyncdapo.cli", "asyncdapo.config.config", "asyncdapo.messages"])
def test_nothing_heavy_is_imported_before_arguments_are_parsed(module: str) -> None:
    heavy = ("torch", "ray", "transformers", "wandb", "pyarrow")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_help_and_a_wrong_key_answer_without_torch() -> None:
    code = (
        "import sys\n"
        "from asyncdapo.cli import main\n"
        "code = main(['config', 'quickstart', 'replay.max_stalness=1'])\n"
        "assert code == 2, code\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
