"""docs/configuration.md, made of the config dataclasses: every key with type, default and doc line.

python -m tests.docs.configuration        writes the page; test_pages.py holds it to be the newest
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from asyncdapo.config.config import SECTIONS
from asyncdapo.config.field_docs import field_docs
from asyncdapo.config.mistakes import numbers_of
from tests.docs.blocks import ROOT

PATH = ROOT / "docs" / "configuration.md"
COMMAND = "python -m tests.docs.configuration"
HEAD = """\
# Configuration

Every key with its type, its default and what it does. This page is made of the dataclasses in `asyncdapo/*/config.py`
and `asyncdapo/config/run.py`.

A config is a YAML file with one section a stage; `model.path` is the only key without a default. A key is changed on
the command line by its full name:

```bash
asyncdapo config quickstart learner.lr=1e-5 run.name=mine
```

prints a config with all its keys. A file that begins with `base: other.yaml`, or `base:` and the name of a shipped
config, holds only what differs from it. `${section.key}` stands for the value of another key. Names that end in `_s`
are seconds, in `_mb` MiB unless the line says MB. `null` is none.
"""
LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
NAMES = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", type(None): "`null`", Any: "any"}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, cls in SECTIONS.items():
        docs, hints = field_docs(cls), get_type_hints(cls, include_extras=True)
        says = " ".join(inspect.cleandoc(cls.__doc__ or "").split())
        parts.append(f"## {section}\n\n{says}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |")
        for key in dataclasses.fields(cls):
            row = (f"`{section}.{key.name}`", kind(hints[key.name]), default(key), " ".join(docs[key.name].split()))
            parts.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def kind(hint: Any) -> str:
    """A type in a reader's words."""
    if hint in NAMES:
        return NAMES[hint]
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [f"{LIMITS[limit]} {number:g}" for limit, number in numbers_of(hint.__metadata__[0])]
        return f"{kind(inside[0])} {' and '.join(limits)}".rstrip()
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(map(kind, inside))
    if origin is dict:
        return f"mapping ({kind(inside[0])}: {kind(inside[1])})"
    if origin is tuple and inside[-1] is Ellipsis:
        return f"list of {kind(inside[0])}"
    if origin is tuple:
        return f"[{', '.join(map(kind, inside))}]"
    raise TypeError(f"{hint}: a type that the page has no words for")


def default(key: dataclasses.Field[Any]) -> str:
    if key.default is not dataclasses.MISSING:
        value = key.default
    elif key.default_factory is not dataclasses.MISSING:
        value = key.default_factory()
    else:
        return "required"
    if isinstance(value, tuple | dict):
        return f"`{list(value) if isinstance(value, tuple) else value}`"
    return f"`{OmegaConf.to_yaml({'_': value}).removeprefix('_:').strip()}`"


if __name__ == "__main__":
    PATH.write_text(page())
