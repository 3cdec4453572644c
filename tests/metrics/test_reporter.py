from __future__ import annotations

import logging
from io import StringIO
from pathlib import Path

import pytest

from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.metrics.reporter import Reporter

CONFIG = MetricsConfig(wandb="disabled")


class Terminal(StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_step_goes_to_the_record_the_log_and_the_output(tmp_path: Path):
    output = StringIO()
    reporter = Reporter(tmp_path, CONFIG, "quickstart", 36, keys={}, stream=output)
    reporter.status("waits for batch 1")
    reporter.log({"step": 1, "reward/mean": 0.5})
    reporter.note("checkpoint written")
    reporter.close()
    assert read_metrics(tmp_path) == [{"step": 1, "reward/mean": 0.5}]
    for text in (output.getvalue(), (tmp_path / "run.log").read_text()):
        status, step, note = (line.split("  ", 1)[1] for line in text.splitlines())
        assert (status, note) == ("waits for batch 1", "checkpoint written")
        assert step.startswith("step  1/36  reward  0.500")


def test_log_records_of_our_stages_and_warnings_of_others_become_notes(tmp_path: Path):
    output = StringIO()
    reporter = Reporter(tmp_path, CONFIG, "quickstart", 36, keys={}, stream=output)
    logging.getLogger("weights").info("travel by %s", "gloo")
    library = logging.getLogger("somelibrary")
    library.setLevel(logging.INFO)
    library.info("chatter")
    library.warning("trouble")
    reporter.close()
    logging.getLogger("weights").warning("after the end")
    said = [line.split("  ", 1)[1] for line in output.getvalue().splitlines()]
    assert said == ["weights: travel by gloo", "somelibrary warning: trouble"]


def test_a_terminal_gets_the_live_view_and_the_log_still_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    reporter = Reporter(tmp_path, CONFIG, "quickstart", 36, keys={}, stream=terminal)
    reporter.log({"step": 1, "reward/mean": 0.5})
    reporter.close()
    assert "quickstart, 36 steps" in terminal.getvalue()
    assert "step  1/36  reward  0.500" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize("where", ["a pipe of a machine that asks for colours", "a cell of Jupyter"])
def test_elsewhere_the_output_is_lines_without_codes_of_a_terminal(where, tmp_path: Path, monkeypatch):
    """Jupyter asks for colours, and runs `!commands` on a terminal of its own."""
    monkeypatch.setenv("TERM", "xterm-color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    if where == "a cell of Jupyter":
        monkeypatch.setenv("JPY_PARENT_PID", "1")
    output = Terminal() if where == "a cell of Jupyter" else StringIO()
    reporter = Reporter(tmp_path, CONFIG, "quickstart", 36, keys={}, stream=output)
    reporter.progress("batch 1: 3/16 groups")
    reporter.log({"step": 1, "reward/mean": 0.5})
    reporter.close()
    assert output.getvalue().split("  ", 1)[1] == "step  1/36  reward  0.500\n"


def test_files_of_another_run_are_not_continued(tmp_path: Path):
    Reporter(tmp_path, CONFIG, "quickstart", 36, keys={}, stream=StringIO()).close()
    with pytest.raises(FileExistsError):
        Reporter(tmp_path, CONFIG, "quickstart", 36, keys={}, stream=StringIO())


def test_a_rollback_takes_lines_out_of_the_record_and_is_a_note_elsewhere(tmp_path: Path):
    first = Reporter(tmp_path, CONFIG, "quickstart", 36, keys={}, stream=StringIO())
    for step in range(4):
        first.log({"step": step})
    first.close()
    output = StringIO()
    reporter = Reporter(tmp_path, CONFIG, "quickstart", 48, go_on=True, keys={}, stream=output)
    reporter.roll_back(1, undone_by=1)
    reporter.log({"step": 2, "reward/mean": 0.5})
    reporter.close()
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1}, {"step": 2, "reward/mean": 0.5}]
    note, step = (line.split("  ", 1)[1] for line in output.getvalue().splitlines())
    assert note == "metrics: lines after step 1 moved to metrics.undone.jsonl"
    assert step.startswith("step  2/48  reward  0.500")


def test_lines_that_were_never_written_are_shown_once_they_are_put_in(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew')
    output = StringIO()
    reporter = Reporter(tmp_path, CONFIG, "quickstart", 36, go_on=True, keys={}, stream=output)
    reporter.roll_back(1, undone_by=1, missing=[{"step": 1, "reward/mean": 0.25}])
    reporter.amend({"eval/accuracy": 0.75})
    reporter.close()
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1, "reward/mean": 0.25, "eval/accuracy": 0.75}]
    torn, line, amended = (text.split("  ", 1)[1] for text in output.getvalue().splitlines())
    assert torn == "metrics: lines of metrics.jsonl that can't be read and are left out: 1"
    assert line == "step  1/36  reward  0.250"
    assert amended == "step  1/36  reward  0.250  accuracy 0.750"
