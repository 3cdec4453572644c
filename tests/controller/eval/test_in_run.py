"""The evaluations of a run: answers are kept under the step of their metrics line, whole or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from asyncdapo.config.config import Config, load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.eval.in_run import RunEvaluation, folder, set_answers_aside
from asyncdapo.controller.roles.opening import Opened
from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from tests.controller.eval.test_evaluation import PROMPTS, answer_at_once

OPENED = Opened(
    branch=0,
    rollout_address="",
    learner_address="",
    ports=(0, 0),
    data_ends=False,
    num_left_out=0,
    num_eval_left_out=0,
    unknown="",
    eval_prompts=PROMPTS,
    eval_texts=[f"<bos>Q: {prompt.row}" for prompt in PROMPTS],
    probe_prompts=[],
)


def config_of(tmp_path: Path, *overrides: str) -> Config:
    settings = ("eval.num_prompts=10", "eval.num_samples=3", "eval.num_greedy_prompts=4", "rollout.group_size=2")
    return load_config(find_config("quickstart"), [f"run.dir={tmp_path}", *settings, *overrides])


def run(config: Config, step: int, ask=answer_at_once, *, greedy: bool = True) -> RunEvaluation:
    evaluation = RunEvaluation(config, OPENED, ask)
    asyncio.run(evaluation.run(step, greedy=greedy))
    return evaluation


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in folder(tmp_path).iterdir()) if folder(tmp_path).exists() else []


def test_every_answer_is_kept_under_the_step_whose_line_has_the_metrics(tmp_path: Path) -> None:
    evaluation = run(config_of(tmp_path), step=10)
    assert not any(name.startswith("step-") for name in kept(tmp_path))
    evaluation.belongs_to(12)
    assert kept(tmp_path) == ["step-000012"]
    answers = [
        json.loads(line) for line in (folder(tmp_path) / "step-000012" / "answers.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 10 * 3 + 4
    assert {(one["prompt_id"], one["prompt"]) for one in answers} == {(i, f"<bos>Q: {i}") for i in range(10)}
    assert json.loads((folder(tmp_path) / "step-000012" / "metrics.json").read_text())["eval/accuracy"] == 0.5
    assert (folder(tmp_path) / "step-000012" / "page.html").exists()


def test_the_next_evaluation_of_a_step_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    run(config_of(tmp_path), step=4).belongs_to(4)
    run(config_of(tmp_path, "eval.num_samples=1"), step=4).belongs_to(4)
    assert kept(tmp_path) == ["step-000004"]
    assert len((folder(tmp_path) / "step-000004" / "answers.jsonl").read_text().splitlines()) == 10 + 4


def test_an_evaluation_that_fails_or_is_given_up_leaves_no_answers(tmp_path: Path) -> None:
    async def fail_at_last(requests: list[EvalRequest]) -> list[EvalAnswer]:
        if requests[0].sampling.temperature == 0:
            raise RunError("a request was given out 5 times")
        return await answer_at_once(requests)

    async def give_up() -> None:
        asked = asyncio.Event()

        async def hang(requests: list[EvalRequest]) -> list[EvalAnswer]:
            if requests[0].sampling.temperature == 0:
                asked.set()
                await asyncio.Event().wait()
            return await answer_at_once(requests)

        evaluation = RunEvaluation(config_of(tmp_path), OPENED, hang)
        running = asyncio.ensure_future(evaluation.run(8, greedy=True))
        await asked.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        evaluation.belongs_to(8)

    with pytest.raises(RunError, match="given out 5 times"):
        run(config_of(tmp_path), step=4, ask=fail_at_last)
    assert kept(tmp_path) == []
    asyncio.run(give_up())
    assert kept(tmp_path) == []


@pytest.mark.parametrize("cancelled", [False, True])
def test_nothing_waits_for_a_page_that_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def render_slowly(*_: object) -> bytes:
        begun.set()
        assert goes_on.wait(20), "the event loop was held up"
        return b"<p>"

    async def evaluate() -> None:
        evaluation = RunEvaluation(config_of(tmp_path), OPENED, answer_at_once)
        running = asyncio.ensure_future(evaluation.run(8, greedy=True))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        if cancelled:
            running.cancel()
        goes_on.set()
        await asyncio.wait([running])
        assert running.cancelled() == cancelled
        evaluation.belongs_to(8)

    monkeypatch.setattr("asyncdapo.controller.eval.answers.render", render_slowly)
    asyncio.run(evaluate())
    assert [name for name in kept(tmp_path) if name.startswith("step-")] == ([] if cancelled else ["step-000008"])


@pytest.mark.parametrize("override", ["eval.keep_answers=false", "eval.num_prompts=0"])
def test_what_is_not_asked_for_is_not_kept(tmp_path: Path, override: str) -> None:
    run(config_of(tmp_path, override), step=4, greedy=False).belongs_to(4)
    assert kept(tmp_path) == []


def test_answers_of_undone_steps_are_set_aside(tmp_path: Path) -> None:
    for step in (0, 4, 8):
        run(config_of(tmp_path), step).belongs_to(step)
    set_answers_aside(tmp_path, 4)
    assert kept(tmp_path) == ["step-000000", "step-000004", "undone-step-000008"]
    run(config_of(tmp_path), 8).belongs_to(8)
    set_answers_aside(tmp_path, 0)
    assert kept(tmp_path) == ["step-000000", "undone-step-000004", "undone-step-000008"]


def test_a_run_without_answers_has_none_to_set_aside(tmp_path: Path) -> None:
    set_answers_aside(tmp_path, 0)
    assert kept(tmp_path) == []
