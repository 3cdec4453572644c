"""The file of vectors, and the inputs of one of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "dapo-vectors/1"


class MisunderstoodError(Exception):
    """A vector, or a file of them, holds something that nothing here knows how to check."""


def read(path: Path) -> list[dict[str, Any]]:
    """The vectors of a file. Raises MisunderstoodError when it isn't what it says it is."""
    content = json.loads(path.read_text())
    if content["format"] != FORMAT:
        raise MisunderstoodError(f"{path}: unknown format {content['format']!r}, known is {FORMAT}")
    if not content["count"] == len(content["vectors"]) > 0:
        raise MisunderstoodError(f"{path}: count is {content['count']}, it holds {len(content['vectors'])} vectors")
    return content["vectors"]


class Inputs:
    """Inputs of a vector by name, which remember those that were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._unread = set(values)

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise MisunderstoodError(f"input {name!r} is missing")
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._unread.discard(name)
        return self._values.get(name, default)

    def one_of(self, name: str, known: Collection[str], *, default: str | None = None) -> str:
        """A name that must be known. `default` is for one that is left out or null; without it there must be one."""
        value = self[name] if default is None else self.get(name) or default
        if value not in known:
            raise MisunderstoodError(f"unknown {name} {value!r}, known are {', '.join(known)}")
        return value

    def records(self, name: str, *keys: str) -> list[dict[str, Any]]:
        """A list of records with exactly these keys."""
        for record in self[name]:
            if record.keys() != set(keys):
                raise MisunderstoodError(f"a record of input {name!r} has {sorted(record)}, known are {sorted(keys)}")
        return self[name]

    def number(self, name: str, default: float) -> float:
        """A number, or the default where it is left out or null."""
        value = self.get(name)
        return default if value is None else value

    def tensor(self, name: str) -> Tensor:
        return torch.tensor(self[name], dtype=torch.float64)

    def mask(self, name: str) -> Tensor:
        return self.tensor(name).bool()

    def finish(self) -> None:
        """Raises MisunderstoodError when an input that is not null was never asked for."""
        if left := sorted(name for name in self._unread if self._values[name] is not None):
            raise MisunderstoodError(f"inputs that nothing reads: {', '.join(left)}")
