"""What Prometheus reads, by its own parser, over a real socket."""

from __future__ import annotations

import re
from urllib.request import urlopen

import pytest

from asyncdapo.metrics.sinks.prometheus_sink import PrometheusSink, series_of
from tests.metrics.documented import EVERY

NAME = re.compile(r"asyncdapo_[a-z0-9_]+")


def test_every_metric_has_a_name_of_its_own_that_prometheus_allows():
    series = {metric: series_of(metric) for metric in (*EVERY, "step", "undone_by")}
    assert all(NAME.fullmatch(name) for name, _ in series.values())
    assert len({(name, *labels.items()) for name, labels in series.values()}) == len(series)


def test_a_number_of_the_users_is_a_label_whatever_its_name_is():
    assert series_of('reward/metrics/"x"\n{1}') == ("asyncdapo_reward_metrics", {"metric": '"x"\n{1}'})
    assert series_of("learner/staleness_3_4/ess") == ("asyncdapo_learner_by_staleness_ess", {"staleness": "3_4"})
    assert series_of("eval/pass@8") == ("asyncdapo_eval_pass_at_8", {})


@pytest.mark.soak
def test_its_own_parser_reads_the_newest_number_of_every_metric_with_its_unit():
    parser = pytest.importorskip("prometheus_client.parser")
    sink = PrometheusSink("127.0.0.1:0", 'quick"start')
    own = 'reward/metrics/"x"\n{1}'
    sink.log({"step": 1} | dict.fromkeys(EVERY, 0.5) | {own: float("nan")})
    sink.log({"step": 2, "reward/mean": 2.5})
    sink.mark_undone([2], undone_by=3)
    with urlopen(f"http://127.0.0.1:{sink.port}/metrics") as answer:
        text = answer.read().decode()
    sink.close()
    families = list(parser.text_string_to_metric_families(text))
    read = {
        (sample.name, *sorted(sample.labels.items())): (sample.value, family.documentation)
        for family in families
        for sample in family.samples
    }
    expected = {metric: 0.5 for metric in EVERY} | {"reward/mean": 2.5, "step": 2, "undone_by": 3}
    for metric, value in expected.items():
        name, labels = series_of(metric)
        found, unit = read[(name, *sorted({"run": 'quick"start', **labels}.items()))]
        assert (found, unit) == (value, EVERY.get(metric, "count") or "number"), metric
    name, labels = series_of(own)
    assert read[(name, *sorted({"run": 'quick"start', **labels}.items()))][0] != 0.5
    assert len(read) == len(expected) + 1
    with pytest.raises(OSError, match=r"refused"):
        urlopen(f"http://127.0.0.1:{sink.port}/metrics")


@pytest.mark.soak
def test_an_address_that_is_taken_is_an_error_with_its_text():
    pytest.importorskip("prometheus_client")
    first = PrometheusSink("127.0.0.1:0", "first")
    with pytest.raises(OSError, match="in use"):
        PrometheusSink(f"127.0.0.1:{first.port}", "second")
    first.close()
