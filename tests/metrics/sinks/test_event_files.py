"""TensorBoard's reader, and Trackio's, find the same series."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdapo.metrics.samples import as_markdown
from asyncdapo.metrics.sinks.tensorboard_sink import TensorBoardSink
from tests.metrics.documented import EVERY
from tests.metrics.sinks.offline_run import SAMPLE

pytestmark = pytest.mark.soak


def test_a_text_in_a_table_is_never_markup():
    row = as_markdown([SAMPLE]).splitlines()[2]
    assert "| `[model]⏎<b>⏎[environment]⏎4042` |" in row
    assert row.count("|") == 11


def test_tensorboards_reader_finds_every_series_and_no_undone_step(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoardSink(tmp_path)
    for step in range(4):
        first.log({"step": step} | dict.fromkeys(EVERY, step / 2))
    first.show_samples([SAMPLE])
    first.close()
    resumed = TensorBoardSink(tmp_path)
    resumed.mark_undone([2, 3], undone_by=1)
    resumed.log({"step": 2} | dict.fromkeys(EVERY, 7.0))
    resumed.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(EVERY)
    for metric in EVERY:
        assert [(event.step, event.value) for event in events.Scalars(metric)] == [(0, 0.0), (1, 0.5), (2, 7.0)]


TRACKIO = """
from asyncdapo.metrics.sinks.trackio_sink import TrackioSink
from tests.metrics.documented import EVERY
from tests.metrics.sinks.offline_run import SAMPLE
for first in (0, 2):
    sink = TrackioSink("project", "name-1a2b", {"run": {"seed": 3}})
    for step in (first, first + 1):
        sink.log({"step": step} | dict.fromkeys(EVERY, step / 2))
    sink.show_samples([SAMPLE])
    sink.mark_undone([first + 1], undone_by=5)
    sink.close()
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("project", "name-1a2b")
for metric in EVERY:
    assert [(row["step"], row[metric]) for row in rows if metric in row] == [(s, s / 2) for s in range(4)], metric
assert [row["step"] for row in rows if row.get("undone_by") == 5] == [1, 3]
[table, _] = [row["samples"] for row in rows if "samples" in row]
print("found them")
"""


def test_trackios_reader_finds_every_series_of_a_run_that_was_resumed(tmp_path: Path):
    pytest.importorskip("trackio")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", TRACKIO], env=environment, capture_output=True, text=True)
    assert "found them" in done.stdout, done.stdout + done.stderr
