"""No step waits for a sink, and none ends a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from threading import Event

import pytest

from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.metrics.reporter import Reporter
from asyncdapo.metrics.samples import Sample
from asyncdapo.metrics.sinks import opening, sink
from asyncdapo.metrics.sinks.sink import BackgroundSink, close_all


class Recording:
    """Keeps every call. It takes none before `gate` is open, and fails at step `fails_at`."""

    def __init__(self, fails_at: int = -1) -> None:
        self.gate, self.fails_at, self.calls = Event(), fails_at, list[object]()

    def open(self) -> Recording:
        self.gate.wait()
        return self

    def log(self, metrics: Mapping[str, float]) -> None:
        if metrics["step"] == self.fails_at:
            raise ConnectionError("the server said\n502")
        self.calls.append(dict(metrics))

    def show_samples(self, samples: Sequence[Sample]) -> None:
        self.calls.append(samples)

    def mark_undone(self, steps: Sequence[int], undone_by: int) -> None:
        self.calls.append((list(steps), undone_by))

    def close(self) -> None:
        self.calls.append("closed")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Two sinks that every reporter gets; the second fails at step 1."""
    made = [Recording(), Recording(fails_at=1)]

    def open_them(*_: object) -> list[BackgroundSink]:
        return [BackgroundSink(name, one.open) for name, one in zip(("good", "bad"), made, strict=True)]

    monkeypatch.setattr("asyncdapo.metrics.reporter.open_sinks", open_them)
    return made


def test_steps_are_done_before_a_sink_has_taken_any_of_them(tmp_path: Path, recordings: list[Recording]):
    reporter = Reporter(tmp_path, MetricsConfig(), "quickstart", 36, keys={}, stream=StringIO())
    for step in range(3):
        reporter.log({"step": step})
        assert read_metrics(tmp_path)[-1] == {"step": step}
    reporter.roll_back(0, undone_by=7)
    assert [one.calls for one in recordings] == [[], []], "no server has answered yet"
    for one in recordings:
        one.gate.set()
    reporter.close()
    assert recordings[0].calls == [{"step": 0}, {"step": 1}, {"step": 2}, ([1, 2], 7), "closed"]


def test_a_sink_that_fails_is_named_once_and_dropped_and_the_others_continue(
    tmp_path: Path, recordings: list[Recording]
):
    output = StringIO()
    reporter = Reporter(tmp_path, MetricsConfig(), "quickstart", 36, keys={}, stream=output)
    for one in recordings:
        one.gate.set()
    for step in range(4):
        reporter.log({"step": step})
    reporter.close()
    assert recordings[0].calls[-2:] == [{"step": 3}, "closed"]
    assert recordings[1].calls == [{"step": 0}]
    [said] = [line for line in output.getvalue().splitlines() if "bad" in line]
    assert said.endswith("metrics warning: bad is dropped, the run continues without it: the server said 502")


def test_a_sink_that_takes_nothing_is_dropped_when_its_queue_is_full(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sink, "MAX_WAITING", 3)
    stuck = Recording()
    background = BackgroundSink("stuck", stuck.open)
    with caplog.at_level(logging.WARNING, "metrics"):
        for step in range(9):
            background.log({"step": step})
        close_all([background])
    assert caplog.messages == ["stuck is dropped, the run continues without it: it has taken nothing for 3 steps"]
    stuck.gate.set()


def test_the_end_of_a_run_waits_for_sinks_together_and_not_for_ever(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sink, "FINISH_TIMEOUT_S", 0.05)
    stuck, free = Recording(), Recording()
    free.gate.set()
    close_all([BackgroundSink("stuck", stuck.open), BackgroundSink("free", free.open)])
    assert caplog.messages == ["stuck hasn't finished after 0.05 s and is left"]
    stuck.gate.set()


def test_each_sink_is_opened_once_and_wandb_only_if_it_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opening, "BackgroundSink", lambda name, open_sink: name)
    config = MetricsConfig(wandb="disabled", sinks=("prometheus", "wandb", "trackio", "prometheus"))
    assert opening.open_sinks(tmp_path, config, "quickstart", {}) == ["prometheus", "trackio"]
