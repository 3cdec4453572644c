"""The board shows what exists, and what a person has to see is on it."""

from __future__ import annotations

import hashlib

import pytest

from asyncdapo.metrics.alarms import BAD_UPDATES, ENTROPY
from asyncdapo.metrics.alarms import LIMITS as ALARMS
from asyncdapo.metrics.dashboard.sections import MAX_PANELS, SCHEMA, SECTIONS, Panel
from asyncdapo.metrics.dashboard.units import unit_of
from asyncdapo.metrics.jsonl import UNDONE_BY
from asyncdapo.metrics.progress import COLUMNS
from asyncdapo.metrics.verdict.verdict import LIMITS
from tests.metrics.documented import EVERY

PANELS = [panel for section in SECTIONS for panel in section.panels]
SHOWN = {metric for panel in PANELS for metric in panel.metrics}
DIGESTS = {1: "955de9650f23", 2: "985bc307ba77"}
"""Of each version of the sections. A change of them needs a new version, or no saved board is replaced."""


def test_the_board_names_only_metrics_that_exist():
    assert sorted(SHOWN - EVERY.keys()) == [UNDONE_BY]


def test_what_has_an_alarm_or_costs_time_or_is_on_the_screen_is_on_the_board():
    needed = {limit.metric for limit in ALARMS} | {ENTROPY, BAD_UPDATES}
    needed |= {f"verdict/{limit}_ratio" for limit in LIMITS} | {column.metric for column in COLUMNS} - {"time/wall_s"}
    assert sorted(needed - SHOWN) == []


def test_mean_and_worst_worker_are_in_one_panel():
    both = {"rollout/worker_tokens_per_s_mean", "rollout/worker_tokens_per_s_min"}
    assert any(both <= set(panel.metrics) for panel in PANELS)


def test_sections_are_few_and_short():
    assert [section.title for section in SECTIONS] == "Verdict Throughput Staleness Learning DAPO Health".split()
    assert all(len(section.panels) <= MAX_PANELS for section in SECTIONS)
    titles = [panel.title for panel in PANELS]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_the_metrics_of_a_panel_have_one_unit(panel: Panel):
    assert len({unit_of(metric) for metric in panel.metrics}) == 1


def test_each_metric_has_the_unit_of_its_page():
    assert {metric: unit_of(metric) for metric in EVERY} == EVERY


def test_other_sections_are_another_version():
    assert hashlib.sha256(repr(SECTIONS).encode()).hexdigest()[:12] == DIGESTS[SCHEMA]
