"""Reading metrics.jsonl as it grows: whatever a run does to the file, what is read is what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.metrics.jsonl import FILE_NAME, MetricsFile, to_metrics, whole_lines
from asyncdapo.metrics.tail import MetricsTail


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["log", "amend", "roll back", "launch", "read"]), max_size=30))
def test_after_every_update_the_lines_are_those_of_the_file(actions: list[str]) -> None:
    with TemporaryDirectory() as folder:
        run_dir, branch = Path(folder), 0
        tail, file = MetricsTail(run_dir), MetricsFile(Path(folder))
        for number, action in enumerate(actions):
            step = int(file.last_line.get("step", -1))
            if action == "log":
                file.log({"step": step + 1, "reward/mean": number / 10})
            elif action == "amend" and step >= 0:
                file.amend({"eval/accuracy": number})
            elif action == "roll back" and step > 0:
                branch += 1
                file.roll_back(step // 2, branch)
            elif action == "launch":
                file.close()
                file = MetricsFile(run_dir, go_on=True)
            elif action == "read":
                tail.update()
                assert tail.lines == [to_metrics(line) for line in whole_lines(run_dir)[0]]
        file.close()
        tail.close()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), max_size=20))
def test_a_line_counts_when_it_is_whole_however_it_was_cut_on_its_way(cuts: list[int]) -> None:
    texts = b"".join(json.dumps({"step": step, "π": None}).encode() + b"\n" for step in range(8))
    with TemporaryDirectory() as folder:
        path, at = Path(folder) / FILE_NAME, 0
        tail = MetricsTail(Path(folder))
        for cut in (*cuts, len(texts)):
            with path.open("ab") as file:
                file.write(texts[at : at + cut])
            at = min(at + cut, len(texts))
            tail.update()
            assert [line["step"] for line in tail.lines] == list(range(texts[:at].count(b"\n")))
        tail.close()


def test_a_line_that_can_not_be_read_is_left_out_and_a_file_may_come_later(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path)
    assert not tail.update()
    (tmp_path / FILE_NAME).write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    assert tail.update()
    assert [line["step"] for line in tail.lines] == [1, 2]
    assert not tail.update()
    tail.close()


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tail = MetricsFile(tmp_path), MetricsTail(tmp_path)
    parsed: list[str] = []
    monkeypatch.setattr("asyncdapo.metrics.tail.parse_line", lambda text: parsed.append(text) or json.loads(text))
    for step in range(5):
        file.log({"step": step})
        tail.update()
    assert len(parsed) == 5
    file.close()
    tail.close()
