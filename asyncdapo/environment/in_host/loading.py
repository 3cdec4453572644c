"""What `environment.path` names, in a host."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from asyncdapo.child.entry import load_file

AGENT = "agent:"


def load(name: str) -> Any:
    """The class at `path/to/file.py:Class` or `package.module:Class`, or the program behind `agent:`. Raises what the
    user's module raises."""
    where, _, attribute = name.removeprefix(AGENT).rpartition(":")
    module = load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    return getattr(module, attribute)
