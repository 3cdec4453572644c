"""What `asyncdapo eval` prints: the tables at the end, and how far it is before that."""

from __future__ import annotations

import logging
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from asyncdapo.controller.eval.command import print_results
from asyncdapo.controller.eval.lines import AnswerLine
from asyncdapo.controller.eval.progress import EvalProgress
from tests.controller.eval.answers import answered, prompt, text


def line(prompt_id: int, sample: int = 0, source: str = "made", **values) -> AnswerLine:
    return AnswerLine.of(answered(prompt_id, sample, **values), prompt(prompt_id, source), text(prompt_id))


def printed(*lines: AnswerLine) -> list[list[str]]:
    """The words of each line."""
    stream = StringIO()
    print_results(lines, Path("evals/mine"), Console(file=stream, width=100, highlight=False))
    return [shown.split() for shown in stream.getvalue().splitlines()]


def test_the_table_has_avg_pass_and_maj_for_powers_of_two_and_all_samples() -> None:
    """Prompt 0: right, right, wrong; prompt 1: wrong, right, wrong, where the wrong prediction is in the majority."""
    lines = [line(0, 0), line(0, 1), line(0, 2, acc=0.0, pred="2")]
    lines += [line(1, 0, acc=0.0, pred="2"), line(1, 1), line(1, 2, acc=0.0, pred="2")]
    assert printed(*lines)[:4] == [
        ["k", "avg@k", "pass@k", "maj@k"],
        ["1", "0.500", "±", "0.500", "0.500", "0.500"],
        ["2", "0.750", "±", "0.250", "0.833", "0.500"],
        ["3", "0.500", "±", "0.167", "1.000", "0.500"],
    ]


def test_lengths_truncation_greedy_answers_and_the_files_stand_below() -> None:
    lines = [line(0, num_tokens=4), line(1, cut=True, num_tokens=1000, acc=0.0), line(0, greedy=True)]
    sampled, greedy, files = [" ".join(words) for words in printed(*lines)[-3:]]
    assert sampled == (
        "sampled: 2 answers to 2 prompts, accuracy 0.500, 502.0 tokens on average, 1,000 at most, 50.0% truncated"
    )
    assert greedy.startswith("greedy: 1 answers to 1 prompts, accuracy 1.000")
    assert files == "evals/mine: answers.jsonl, metrics.json, page.html"


def test_answers_without_a_verdict_are_counted_and_said() -> None:
    lines = [line(0), line(1, acc=0.0, failure="no judge")]
    said = "; 1 weren't judged and count as wrong"
    assert " ".join(printed(*lines)[-2]).endswith(said)
    assert "judged" not in " ".join(printed(lines[0])[-2])


def test_data_of_several_sources_has_a_row_for_each() -> None:
    lines = [line(0, source="b [x]", pred=None), line(1, source="a", acc=0.0), line(2, source="a")]
    assert [
        printed(*lines)[2],
        printed(*lines)[3][:3],
    ] == [["source", "prompts", "k", "avg@k", "pass@k", "maj@k"], ["a", "2", "1"]]
    assert printed(*lines)[4] == ["b", "[x]", "1", "1", "1.000", "1.000", "-"]
    assert not any("source" in words for words in printed(line(0)))


def test_greedy_answers_alone_have_no_table() -> None:
    assert [words[0] for words in printed(line(0, greedy=True))] == ["greedy:", "evals/mine:"]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(tmp_path: Path) -> None:
    stream = StringIO()
    progress = EvalProgress(tmp_path / "logs" / "controller.log", stream)
    progress.begin(4, [answered(0), answered(0, 1, acc=0.0)])
    progress.answered([answered(1, acc=0.0)])
    logging.getLogger("controller").warning("rollout-0: the process died")
    progress.answered([answered(1, greedy=True)])
    progress.close()
    said = [shown.split("  ", 1)[1] for shown in stream.getvalue().splitlines()]
    assert said[0] == "controller warning: rollout-0: the process died"
    assert said[1].startswith("answers 4/4  accuracy 0.333  ")  # of sampled ones
    assert (tmp_path / "logs" / "controller.log").read_text() == stream.getvalue()


def test_a_terminal_gets_a_bar_and_the_log_still_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    progress = EvalProgress(tmp_path / "controller.log", terminal)
    progress.status("starting processes")
    progress.begin(2, [])
    progress.answered([answered(0), answered(1)])
    progress.note("a worker [died]")
    progress.close()
    shown = terminal.getvalue()
    assert "2/2" in shown
    assert "accuracy 1.000" in shown
    assert "a worker [died]" in shown
    assert "a worker [died]" in (tmp_path / "controller.log").read_text()
