"""Prometheus: the newest number of each metric, at an address that Prometheus reads.

In: the metrics of each step. Out: gauges, as text over HTTP at `metrics.prometheus_address`, with the run's name as
label. A metric of another step stays until it comes again. What varies in a name is a label, so that no name is made of
text of the user's: `reward/metrics/NAME`, `learner/staleness_BUCKET/NAME`. Prometheus keeps what it has read: an undone
step stays there, and `asyncdapo_undone_by` is set from then on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from asyncdapo.metrics.dashboard.units import OWN_NUMBERS, unit_of
from asyncdapo.metrics.jsonl import UNDONE_BY
from asyncdapo.metrics.samples import Sample

if TYPE_CHECKING:
    from prometheus_client.metrics_core import GaugeMetricFamily

PREFIX = "asyncdapo_"
BY_STALENESS = re.compile(r"learner/staleness_([0-9][0-9a-z_]*)/(\w+)")

logger = logging.getLogger("metrics")


class PrometheusSink:
    """Serves the metrics of one run at `address`, host:port; port 0 is any free one. Raises OSError if it is taken."""

    def __init__(self, address: str, run_name: str) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._run_name, self._newest = run_name, dict[str, float]()
        host, _, port = address.rpartition(":")
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(int(port), host, registry)
        self.port = self._server.server_port
        logger.info("Prometheus reads http://%s:%d/metrics", host, self.port)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What is served, at each request, in a thread of the server."""
        from prometheus_client.metrics_core import GaugeMetricFamily

        families: dict[str, GaugeMetricFamily] = {}
        for metric, value in self._newest.items():
            name, labels = series_of(metric)
            family = families.setdefault(
                name, GaugeMetricFamily(name, f"{unit_of(metric) or 'number'}", labels=["run", *labels])
            )
            family.add_metric([self._run_name, *labels.values()], value)
        yield from families.values()

    def log(self, metrics: Mapping[str, float]) -> None:
        self._newest = {**self._newest, **metrics}  # a new one, since another thread may be reading

    def show_samples(self, samples: Sequence[Sample]) -> None:
        """Prometheus has numbers only."""

    def mark_undone(self, steps: Sequence[int], undone_by: int) -> None:
        self.log({UNDONE_BY: undone_by})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def series_of(metric: str) -> tuple[str, dict[str, str]]:
    """Name and labels of a metric at Prometheus, without `run`."""
    if metric.startswith(OWN_NUMBERS):
        return f"{PREFIX}reward_metrics", {"metric": metric.removeprefix(OWN_NUMBERS)}
    if bucket := BY_STALENESS.fullmatch(metric):
        return f"{PREFIX}learner_by_staleness_{bucket[2]}", {"staleness": bucket[1]}
    return PREFIX + re.sub(r"\W", "_", metric.replace("@", "_at_"), flags=re.ASCII), {}
