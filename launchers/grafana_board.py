"""Writes launchers/grafana_board.json: the board of a run for Grafana, over what `metrics.sinks: [prometheus]` serves.

    python launchers/grafana_board.py

In: the sections of the board, which W&B shows as well. Out: a dashboard to import in Grafana: a row for each section, a
time series for each panel, a choice of data source and of runs. Axes have units. A test compares the file with what
this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asyncdapo.metrics.dashboard.sections import SCHEMA, SECTIONS, Panel
from asyncdapo.metrics.sinks.prometheus_sink import series_of

PATH = Path(__file__).with_suffix(".json")
COLUMNS, WIDTH, HEIGHT = 3, 8, 7
"""Of panels, on Grafana's grid of 24."""
UNITS = {"s": "s", "bytes": "bytes", "GiB": "gbytes", "ratio": "percentunit"}
"""Grafana's names of units; the others stand at the axis as they are."""
SOURCE = {"type": "prometheus", "uid": "${source}"}


def board() -> dict[str, Any]:
    """The whole dashboard."""
    panels: list[dict[str, Any]] = []
    top = 0
    for section in SECTIONS:
        place = {"x": 0, "y": top, "w": COLUMNS * WIDTH, "h": 1}
        panels.append({"type": "row", "title": section.title, "collapsed": False, "gridPos": place, "panels": []})
        top += 1
        for index, panel in enumerate(section.panels):
            row, column = divmod(index, COLUMNS)
            place = {"x": column * WIDTH, "y": top + row * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_time_series(panel, place))
        top += -(-len(section.panels) // COLUMNS) * HEIGHT
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    return {
        "title": f"asyncdapo {SCHEMA}",
        "uid": "asyncdapo",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_choice_of_source(), _choice_of_runs()]},
        "panels": panels,
    }


def _time_series(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    stacking = {"lines": "none", "stack": "normal", "shares": "percent"}[panel.look]
    drawn = {"axisLabel": panel.unit, "fillOpacity": 0 if stacking == "none" else 60, "stacking": {"mode": stacking}}
    unit = "short" if panel.look == "shares" else UNITS.get(panel.unit, "short")
    return {
        "type": "timeseries",
        "title": panel.title,
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "custom": drawn}, "overrides": []},
        "targets": [_target(metric, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[at]) for at, metric in enumerate(panel.metrics)],
    }


def _target(metric: str, letter: str) -> dict[str, Any]:
    name, labels = series_of(metric)
    chosen = ", ".join(['run=~"$run"', *(f'{label}="{value}"' for label, value in labels.items())])
    legend = f"{metric} {{{{run}}}}"
    return {"refId": letter, "datasource": SOURCE, "expr": f"{name}{{{chosen}}}", "legendFormat": legend}


def _choice_of_source() -> dict[str, Any]:
    return {"name": "source", "label": "source", "type": "datasource", "query": "prometheus"}


def _choice_of_runs() -> dict[str, Any]:
    query = f"label_values({series_of('step')[0]}, run)"
    many = {"multi": True, "includeAll": True, "current": {"text": "All", "value": "$__all"}}
    return {"name": "run", "label": "run", "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, **many}


def to_text(board: dict[str, Any]) -> str:
    """As JSON, a line for each panel."""
    head = json.dumps({**board, "panels": []}, indent=1).removesuffix("[]\n}")
    lines = ",\n".join(json.dumps(panel, ensure_ascii=False) for panel in board["panels"])
    return f"{head}[\n{lines}\n]}}\n"


if __name__ == "__main__":
    PATH.write_text(to_text(board()))
