"""The numbers of the page's charts."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.accounting.names import STALENESS_BUCKETS
from asyncdapo.controller.watch.charts import CHARTS, MOST_POINTS, Chart, columns, ends
from tests.metrics.test_metrics_page import DOCUMENTED

METRICS = {"a/x": "x", "a/y": "y"}
NUMBERS = st.dictionaries(st.sampled_from(sorted(METRICS)), st.floats(0, 1e6) | st.just(math.nan))


def test_every_chart_names_its_axis_and_metrics_of_the_page() -> None:
    shown = {metric for chart in CHARTS for metric in chart.series}
    buckets = {metric for metric in shown if metric.startswith("learner/staleness_")}
    assert shown - buckets <= DOCUMENTED
    assert buckets == {f"learner/staleness_{name}/tokens" for name in STALENESS_BUCKETS}
    assert all(chart.title and chart.axis for chart in CHARTS)
    assert len({chart.title for chart in CHARTS}) == len(CHARTS)


@settings(max_examples=40)
@given(st.lists(NUMBERS, max_size=20), st.booleans(), st.booleans())
def test_every_series_has_a_number_for_each_line_and_shares_sum_to_1(
    lines: list[dict[str, float]], counts: bool, shares: bool
) -> None:
    chart = Chart(title="t", axis="a", series=METRICS, look="stack", counts=counts, shares=shares)
    numbers = columns(chart, lines)
    assert [len(column) for column in numbers] == [len(lines)] * 2
    for line in zip(*numbers, strict=True):
        known = [number for number in line if math.isfinite(number)]
        assert all(number >= 0 for number in known)
        if shares and known:
            assert math.isclose(sum(known), 1)


def test_of_many_lines_a_point_is_the_mean_of_neighbours_at_their_last_step() -> None:
    lines = [{"step": float(step), "a/x": float(step)} for step in range(1, 2 * MOST_POINTS + 1)]
    lines[0]["a/x"] = math.nan
    steps = ends([line["step"] for line in lines])
    [column] = columns(Chart(title="t", axis="a", series={"a/x": "x"}), lines)
    assert (steps[0], steps[-1], len(steps), len(column)) == (2, 2 * MOST_POINTS, MOST_POINTS, MOST_POINTS)
    assert column[:2] == [2.0, 3.5]


def test_a_count_shows_what_each_step_added_and_not_what_was_counted_again() -> None:
    chart = Chart(title="t", axis="a", series={"a/x": "x"}, counts=True)
    [first, second, third, fourth, fifth] = columns(chart, [{"a/x": 3}, {"a/x": 5}, {}, {"a/x": 2}, {"a/x": 2}])[0]
    assert second == 2
    assert fifth == 0
    assert all(map(math.isnan, (first, third, fourth)))
    assert math.isnan(columns(chart, [{"a/x": 9}, {"a/x": 1}])[0][1])
