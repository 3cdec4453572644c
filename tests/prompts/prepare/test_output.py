"""The directory that `asyncdapo data prepare` writes: whole or as it was, and never somebody else's."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.config.run import EvalConfig
from asyncdapo.prompts.prepare import command
from asyncdapo.prompts.prepare.output import begin
from asyncdapo.prompts.registry import open_task

from .made import counts, prepare, rows, write_jsonl, write_parquet

PAIRS = [{"question": f"{i} + 1 = ?", "answer": i + 1} for i in range(5)]


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", PAIRS)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_command_again_does_nothing_and_says_so(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert prepare(source, "--out", out) == 0
    first, printed = contents(out), capsys.readouterr().out
    assert prepare(source, "--out", out) == 0
    assert contents(out) == first
    assert capsys.readouterr().out == f"{out} is prepared already, from the same input with the same options\n{printed}"


def test_the_same_input_and_options_make_the_same_bytes(tmp_path, source):
    for out in ("first", "second"):
        prepare(source, "--out", tmp_path / out)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("change", ["option", "input", "output"])
def test_other_data_in_the_directory_are_replaced_only_by_force(tmp_path, source, capsys, change):
    out = tmp_path / "out"
    prepare(source, "--out", out)
    options = ("--template", "Q: {prompt}") if change == "option" else ()
    if change == "input":
        write_jsonl(source, PAIRS[:3])
    if change == "output":
        (out / "train.parquet").write_bytes(b"PAR1")
    before = contents(out)
    assert prepare(source, "--out", out, *options) == 2
    assert (
        f"differs in {dict(option='options', input='files', output='its own files')[change]}" in capsys.readouterr().err
    )
    assert contents(out) == before
    assert prepare(source, "--out", out, *options, "--force") == 0
    assert len(rows(out)) == (3 if change == "input" else 5)
    assert rows(out)[0]["prompt"].startswith("Q: ") == (change == "option")


def test_a_directory_of_something_else_is_refused_even_by_force(tmp_path, source, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert prepare(source, "--out", tmp_path / "out", "--force") == 2
    assert "holds something that `asyncdapo data prepare` didn't write" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_force_replaces_no_file_that_somebody_put_there(tmp_path, source, capsys):
    prepare(source, "--out", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert prepare(source, "--out", tmp_path / "out", "--template", "Q: {prompt}", "--force") == 2
    assert "holds notes.txt, which `asyncdapo data prepare` didn't write" in capsys.readouterr().err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_directory_is_followed(tmp_path, source, there):
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert prepare(source, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "disk", "out"]
    assert (tmp_path / "out").is_symlink()
    assert len(rows(tmp_path / "disk")) == 5


def test_a_directory_that_cannot_be_written_is_said(tmp_path, source, capsys):
    assert prepare(source, "--out", source / "out") == 2
    assert f"--out {source / 'out'}: can't be written" in capsys.readouterr().err


def test_of_two_at_once_one_prepares_and_the_other_is_refused(tmp_path, source, capsys):
    with begin(tmp_path / "out") as unfinished:
        (unfinished / "train.parquet").write_bytes(b"half")
        assert prepare(source, "--out", tmp_path / "out") == 2
        assert f"another process prepares it, {os.getpid()} (" in capsys.readouterr().err
        assert (unfinished / "train.parquet").read_bytes() == b"half"
    assert prepare(source, "--out", tmp_path / "out") == 0


def test_an_empty_directory_is_used(tmp_path, source):
    (tmp_path / "out").mkdir()
    assert prepare(source, "--out", tmp_path / "out") == 0


def test_a_job_that_is_killed_leaves_the_directory_as_it_was_and_the_next_one_cleans_up(tmp_path, source):
    out = tmp_path / "out"
    prepare(source, "--out", out)
    before = contents(out)
    big = write_jsonl(tmp_path / "in" / "big.jsonl", [{"question": f"{i} + 1 = ?", "answer": 1} for i in range(50_000)])
    job = subprocess.Popen([sys.executable, "-m", "asyncdapo.cli", "data", "prepare", big, "--out", out, "--force"])
    while not (tmp_path / ".out.new" / "train.parquet").exists():
        assert job.poll() is None
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert contents(out) == before
    assert (tmp_path / ".out.new").exists()
    assert prepare(source, "--out", out, "--template", "{prompt}", "--force") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "in", "out"]


def test_the_manifest_says_what_it_was_made_from(tmp_path, source):
    prepare(source, "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest) == {"schema", "version", "made_from", "counts", "use", "files"}
    assert manifest["made_from"]["files"]["train"][0]["name"] == "a.jsonl"
    assert set(manifest["files"]) == {"train.parquet", "unusable.jsonl"}


def test_the_keys_that_are_printed_make_a_run_read_the_prepared_rows(tmp_path, source, capsys):
    prepare(source, "--out", tmp_path / "out")
    keys = capsys.readouterr().out.rpartition("use it with\n")[2].split()
    config = load_config(tmp_path / "c.yaml" if (tmp_path / "c.yaml").write_text("model: {path: m}") else None, keys)
    task = open_task(config.prompts, num_eval=0, seed=0)
    assert [task.question_at(row).text for row in range(5)] == [row["prompt"] for row in rows(tmp_path / "out")]
    assert {task.question_at(row).source for row in range(5)} == {"a.jsonl"}


@pytest.mark.parametrize("num_rows", [2, 5, 60, 3000, 6000])
def test_the_keys_that_are_printed_hold_out_no_more_than_a_tenth_of_few_rows(tmp_path, capsys, num_rows):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}", "answer": i} for i in range(num_rows)])
    prepare(source, "--out", tmp_path / "out")
    keys = capsys.readouterr().out.rpartition("use it with\n")[2].split()
    (tmp_path / "c.yaml").write_text("model: {path: m}")
    config = load_config(tmp_path / "c.yaml", keys)
    usual = EvalConfig()
    tenth = max(1, num_rows // 10)
    assert config.eval.num_prompts == min(tenth, usual.num_prompts)
    assert config.eval.num_greedy_prompts == min(tenth, usual.num_greedy_prompts)
    task = open_task(config.prompts, num_eval=config.eval.num_prompts, seed=0)
    assert len(task.parts[0].rows) + task.num_eval_rows == num_rows


@pytest.mark.parametrize("num_rows", [11, 5000])
def test_rows_that_are_held_out_are_the_test_split_of_the_same_data(tmp_path, capsys, num_rows):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}", "answer": i} for i in range(num_rows)])
    for out in ("whole", "split", "again"):
        prepare(source, "--out", tmp_path / out, *(() if out == "whole" else ("--hold-out", 10)))
    training, test = rows(tmp_path / "split"), rows(tmp_path / "split", "test")
    assert (len(training), len(test)) == (num_rows - 10, 10)
    assert sorted([*training, *test], key=lambda row: row["row"]) == rows(tmp_path / "whole")
    assert contents(tmp_path / "split") == contents(tmp_path / "again")
    found = counts(tmp_path / "split")
    assert found.pop("read") == sum(found.values())
    printed = capsys.readouterr().out
    assert f"held out{10:18}   in test.parquet\n" in printed
    assert printed.endswith(f"prompts.eval_path={tmp_path}/again/test.parquet reward.verifier=answer\n")


@pytest.mark.parametrize(
    ("names", "number", "words"),
    [
        (["a"], 5, "--hold-out 5: must be at least 1 and leave some of the 5 rows (--hold-out 1)"),
        (["a"], 0, "--hold-out 0: must be at least 1"),
        (["train", "test"], 1, "in has train, test already (leave it out)"),
        (["test"], 1, "in has test already (leave it out)"),
    ],
)
def test_holding_out_all_or_from_data_with_a_test_split_is_refused(tmp_path, capsys, names, number, words):
    for name in names:
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", PAIRS)
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--hold-out", number) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_line_shows_how_far_it_is_and_goes_away(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "in" / "a.parquet", PAIRS)
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(command, "PROGRESS_S", 0.0)
    assert prepare(source, "--out", tmp_path / "out") == 0
    assert "train: 4 of 5 rows read, 4 kept" in shown.getvalue()
    assert shown.getvalue().endswith("\r\033[K")
