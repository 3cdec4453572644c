"""The board of a project at W&B: a saved view with the sections of `dashboard/sections`.

In: entity and project. Out: one saved view, `NAME` at W&B, that everyone in the project finds. Its title has the
version of the sections. It is written when it is missing or of a lower version, so what people change in it stays until
then. Does not own: what a report says (`wandb_report`), which uses the same panels.

    python -m asyncdapo.metrics.sinks.wandb_board ENTITY PROJECT

A run saves it by this command, in a process of its own: the import of W&B's package for it holds Python's lock for some
tenths of a second, in which no other thread runs.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from asyncdapo.metrics.dashboard.sections import SCHEMA, SECTIONS, Panel, Section

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.reports.v2.interface import PanelTypes
    from wandb_workspaces.workspaces import Workspace

NAME = "asyncdapo"
"""In the view's address: ?nw=asyncdapo"""
TITLE = f"asyncdapo {SCHEMA}"
LOOKS: dict[str, Any] = {"lines": "line", "stack": "stacked-area", "shares": "pct-area"}


def save_board(entity: str, project: str) -> bool:
    """Save the board in this project, if there is none of this version or a later one. Returns whether it was saved."""
    from wandb_workspaces.workspaces import Workspace, internal

    board = workspace(entity, project)
    board._internal_name = internal._url_query_str_to_internal_name(NAME)
    try:
        there: Workspace = Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={NAME}")
    except ValueError:  # there is no such view
        board.save()
        return True
    if version_of(there.name) >= SCHEMA:
        return False
    board._internal_id = there._internal_id
    board.save()
    return True


def version_of(title: str) -> int:
    """Of the sections that a view with this title was made of; 0 of one that was renamed."""
    found = re.fullmatch(rf"{NAME} (\d+)", title)
    return int(found[1]) if found else 0


def workspace(entity: str, project: str) -> Workspace:
    """The board as W&B's package has it."""
    from wandb_workspaces.workspaces import Section as ViewSection
    from wandb_workspaces.workspaces import SectionLayoutSettings, Workspace, WorkspaceSettings

    layout = SectionLayoutSettings(columns=4, rows=2)
    return Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            ViewSection(name=section.title, panels=plots(section), is_open=True, layout_settings=layout)
            for section in SECTIONS
        ],
        settings=WorkspaceSettings(x_axis="step"),
    )


def plots(section: Section) -> list[PanelTypes]:
    """A plot for each panel."""
    return [plot(panel) for panel in section.panels]


def plot(panel: Panel) -> LinePlot:
    """A panel as W&B draws it."""
    from wandb_workspaces.reports.v2 import LinePlot

    smoothing: dict[str, Any] = {}
    if panel.smoothing:
        smoothing = {"type": "exponential", "factor": panel.smoothing, "show_original": True}
    return LinePlot(
        title=panel.title,
        x="step",
        y=list(panel.metrics),
        title_x="train step",
        title_y=panel.unit,
        plot_type=LOOKS[panel.look],
        **{f"smoothing_{key}": value for key, value in smoothing.items()},
    )


if __name__ == "__main__":
    save_board(*sys.argv[1:])
