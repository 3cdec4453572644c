"""The files of an evaluation: what a killed process leaves can be resumed, and what isn't whole isn't there."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.controller.eval.answers import AnswerFiles
from asyncdapo.controller.eval.lines import AnswerLine, cut_torn_line, encode, read_lines
from asyncdapo.errors import DiskError, UserError
from tests.controller.eval.answers import answered, prompt, text

PROMPTS = [prompt(number) for number in range(4)]
TEXTS = [text(number) for number in range(4)]


def files_in(directory: Path) -> AnswerFiles:
    return AnswerFiles(directory, PROMPTS, TEXTS)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_line_says_all_that_is_needed_to_judge_an_answer_by_eye(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    files.open(keep=True)
    files.append([answered(2, 5, acc=0.0, response="1 < 2 & ü\u2028", pred=None, cut=True)])
    assert json.loads((tmp_path / "answers.jsonl").read_text()) == {
        "prompt_id": 2,
        "sample": 5,
        "greedy": False,
        "source": "made",
        "row": 12,
        "prompt": "<bos>What is 2?",
        "answer": "2",
        "response": "1 < 2 & ü\u2028",
        "pred": None,
        "acc": 0.0,
        "failure": "",
        "num_tokens": 7,
        "finish_reason": "length",
        "version_min": 3,
        "version_max": 4,
    }


def test_a_line_of_an_episode_says_which_of_its_text_the_model_wrote(tmp_path: Path) -> None:
    parts = [(1, "47*86"), (0, "4042\n"), (1, ""), (0, "ü𝄞"), (1, "Answer: 4042")]
    files = files_in(tmp_path)
    files.open(keep=True)
    files.append([answered(0, parts=parts)])
    written = json.loads((tmp_path / "answers.jsonl").read_text())
    assert written["response"] == "47*864042\nü𝄞Answer: 4042"
    assert written["sampled"] == [[1, 5], [0, 5], [1, 0], [0, 2], [1, 12]]
    [line] = read_lines(tmp_path / "answers.jsonl")
    assert line.answered().answer.parts == parts


def test_answers_are_on_disk_as_soon_as_they_are_there_and_known_when_opened_again(
    tmp_path: Path,
) -> None:
    first, second = [answered(0), answered(0, 1)], [answered(0, greedy=True)]
    files = files_in(tmp_path)
    assert files.open(keep=True) == []
    files.append(first)
    files.append(second)
    again = files_in(tmp_path)  # the other one was never closed: its process was killed
    assert again.open(keep=True) == first + second


def test_an_answer_that_was_not_judged_is_not_known_and_may_come_again(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    files.open(keep=True)
    files.append([answered(0), answered(1, acc=0.0, failure="the judge is down")])
    again = files_in(tmp_path)
    assert again.open(keep=True) == [answered(0)]
    again.append([answered(1)])
    lines = read_lines(tmp_path / "answers.jsonl")
    assert [(line.prompt_id, line.failed) for line in lines] == [(0, False), (1, False)]


@given(answers=st.lists(st.integers(0, 3), min_size=1, max_size=4), cut=st.integers(0, 2000))
def test_a_line_that_was_torn_is_cut_off_and_no_whole_one_is_lost(tmp_path_factory, answers, cut) -> None:
    directory = tmp_path_factory.mktemp("torn")
    lines = [encode(AnswerLine.of(answered(number), prompt(number), text(number))) for number in answers]
    whole = b"".join(lines)
    kept = whole[: min(cut, len(whole))]
    (directory / "answers.jsonl").write_bytes(kept)
    num_whole = kept.count(b"\n")
    files = files_in(directory)
    assert files.open(keep=True) == [answered(number) for number in answers[:num_whole]]
    files.append([answered(3, 9)])
    assert (directory / "answers.jsonl").read_bytes().count(b"\n") == num_whole + 1
    assert list(read_lines(directory / "answers.jsonl"))[-1].sample == 9


def test_a_torn_line_longer_than_a_block_of_the_search_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"whole\n" + b"x" * 200_000)
    cut_torn_line(path)
    assert path.read_bytes() == b"whole\n"
    path.write_bytes(b"x" * 200_000)
    cut_torn_line(path)
    assert path.read_bytes() == b""


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_bytes(b'{"prompt_id": "zero"}\n')
    with pytest.raises(UserError, match=r"answers.jsonl: line 1 is no answer .*remove the line"):
        files_in(tmp_path).open(keep=True)


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    files.open(keep=True)
    files.append([answered(1)])
    for other in (
        AnswerFiles(tmp_path, PROMPTS, ["something else"] * 4),
        AnswerFiles(tmp_path, PROMPTS[:1], TEXTS[:1]),
    ):
        with pytest.raises(UserError, match="answers to other prompts, such as made row 11"):
            other.open(keep=True)


def test_metrics_stand_only_beside_all_their_answers(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    files.open(keep=True)
    files.append([answered(0)])
    asyncio.run(files.close({"eval/accuracy": 1.0}))
    assert names_in(tmp_path) == ["answers.jsonl", "metrics.json", "page.html"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"eval/accuracy": 1.0}
    files_in(tmp_path).open(keep=True)  # more is asked for
    assert names_in(tmp_path) == ["answers.jsonl"]


def test_what_is_begun_anew_has_its_name_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    final = tmp_path / "step-000012"
    for accuracy in (0.5, 1.0):  # the second one takes the place of the first, once it is whole
        files = files_in(final)
        assert files.open(keep=False) == []
        files.append([answered(0)])
        assert not (final / "metrics.json").exists() or "0.5" in (final / "metrics.json").read_text()
        asyncio.run(files.close({"eval/accuracy": accuracy}))
        assert str(accuracy) in (final / "metrics.json").read_text()
    assert len((final / "answers.jsonl").read_text().splitlines()) == 1
    assert names_in(tmp_path) == ["step-000012"]


@pytest.mark.parametrize("killed", [True, False])
def test_what_was_given_up_leaves_nothing_that_looks_whole(tmp_path: Path, killed: bool) -> None:
    final = tmp_path / "step-000012"
    files = files_in(final)
    files.open(keep=False)
    files.append([answered(0)])
    if not killed:
        files.give_up()
        assert names_in(tmp_path) == []
    assert not final.exists()
    assert files_in(final).open(keep=False) == []


def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    files.open(keep=True)
    files._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the system's own full disk
    with pytest.raises(DiskError, match=r"answers.jsonl: can't be written: No space left"):
        files.append([answered(0)])
    files.give_up()  # and what was said stays what is said
