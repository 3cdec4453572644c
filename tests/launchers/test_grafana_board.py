"""Grafana's board is the newest, and names only what Prometheus gets."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from asyncdapo.metrics.dashboard.sections import SECTIONS
from asyncdapo.metrics.sinks.prometheus_sink import series_of
from tests.metrics.documented import EVERY

LAUNCHERS = Path(__file__).parents[2] / "launchers"
TEXT = (LAUNCHERS / "grafana_board.json").read_text()
BOARD = json.loads(TEXT)
DRAWN = [panel for panel in BOARD["panels"] if panel["type"] == "timeseries"]


def test_the_file_is_what_the_sections_make():
    spec = importlib.util.spec_from_file_location("grafana_board", LAUNCHERS / "grafana_board.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.to_text(made.board()) == TEXT, "write it anew: python launchers/grafana_board.py"


def test_it_names_only_series_of_metrics_that_exist():
    known = {(name, *labels.items()) for name, labels in map(series_of, (*EVERY, "undone_by"))}
    targets = [target["expr"] for panel in DRAWN for target in panel["targets"]]
    for expression in targets:
        name, chosen = re.fullmatch(r"(\w+)\{(.*)\}", expression).groups()  # pyright: ignore[reportOptionalMemberAccess]
        labels = dict(re.findall(r'(\w+)="(\w*)"', chosen))
        assert (name, *labels.items()) in known, expression
    assert len(set(targets)) == len(
        {metric for section in SECTIONS for panel in section.panels for metric in panel.metrics}
    )


def test_panels_dont_overlap_and_have_a_title_and_a_unit():
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells
        assert all(x < 24 for x, _ in own)
        cells |= own
    assert all(panel["title"] for panel in BOARD["panels"])
    units = {panel["title"]: panel["fieldConfig"]["defaults"] for panel in DRAWN}
    assert units["Duration of a step"]["unit"] == "s"
    assert units["Entropy of the policy"]["custom"]["axisLabel"] == "nats"
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


@pytest.mark.parametrize("panel", DRAWN, ids=lambda panel: panel["title"])
def test_each_number_of_a_panel_has_a_letter_of_its_own(panel: dict):
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters) > 0
