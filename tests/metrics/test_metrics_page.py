"""The page of metrics and the code name the same metrics."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from asyncdapo.metrics.curve import PANELS
from asyncdapo.metrics.progress import COLUMNS
from tests.metrics.documented import METRIC, PREFIXES, UNITS

ROOT = Path(__file__).parents[2]
DOCUMENTED = set(UNITS)


@cache
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sorted((ROOT / "asyncdapo").rglob("*.py"))]


@cache
def strings() -> set[str]:
    """Every string constant of the package, docstrings among them."""
    return {
        node.value
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def templates() -> list[re.Pattern[str]]:
    """Names that are put together, as `f"replay/tokens_{end}"`: a pattern with a group for the part that varies."""
    joined = [node for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    sources = [
        "".join(re.escape(part.value) if isinstance(part, ast.Constant) else "([a-z0-9_]+)" for part in node.values)
        for node in joined
    ]
    return [re.compile(source) for source in sources if re.match(rf"(?:{PREFIXES})/", source)]


def test_every_metric_on_the_page_is_made_by_the_code():
    words, patterns = strings(), templates()

    def is_made(name: str) -> bool:
        if name.endswith("@K"):  # a number in its place
            return any(pattern.fullmatch(name.replace("@K", "@8")) for pattern in patterns)
        matches = [pattern.fullmatch(name) for pattern in patterns]
        return name in words or any(match is not None and match[1] in words for match in matches)

    assert len(DOCUMENTED) > 50
    assert [name for name in sorted(DOCUMENTED) if not is_made(name)] == []


def test_every_metric_that_the_code_names_is_on_the_page():
    named = {text for text in strings() if METRIC.fullmatch(text)}
    assert sorted(named - DOCUMENTED) == []


def test_what_progress_and_curve_show_is_on_the_page():
    shown = {column.metric for column in COLUMNS} | {
        name for panel in PANELS for name in (panel.over, *(series.metric for series in panel.series))
    }
    assert sorted(shown - DOCUMENTED - {"step"}) == []
