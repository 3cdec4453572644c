"""A report of one run at W&B: what is to say about it, and the panels of the board with its curves alone.

In: words and a table. Out: a new report in the run's project. Does not own: the words (`controller/commands/report`),
the panels (`dashboard/sections`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncdapo.metrics.dashboard.sections import SECTIONS
from asyncdapo.metrics.sinks.wandb_board import plots


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a report says above its curves."""

    title: str
    paragraphs: Sequence[str]
    table: str
    """Markdown."""


def save_report(entity: str, project: str, run_id: str, story: Story) -> str:
    """Save it, and return its address."""
    from wandb_workspaces.expr import Metric
    from wandb_workspaces.reports.v2.interface import H2, MarkdownBlock, P, PanelGrid, Report, Runset

    blocks = [*map(P, story.paragraphs), MarkdownBlock(text=story.table)]
    for section in SECTIONS:
        this_run = Runset(entity=entity, project=project, name="this run", filters=[Metric("ID") == run_id])
        blocks += [H2(section.title), PanelGrid(runsets=[this_run], panels=plots(section))]
    report = Report(entity=entity, project=project, title=story.title[:128], blocks=blocks, width="fluid")
    report.save()
    return report.url
