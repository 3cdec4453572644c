"""The doc line under each key of a section, for the printed config and its page.

In: a dataclass, whose source has a string under each field. Out: these strings by field. Does not own: how they are
printed (`config`).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The doc line under each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = inspect.cleandoc(following.value.value)  # type: ignore[union-attr]
    return docs
