"""Evaluation: which requests are made, and what is said of their answers."""

from __future__ import annotations

import asyncio

from asyncdapo.controller.config import EvalConfig
from asyncdapo.controller.evaluation import Evaluation
from asyncdapo.messages import EvalAnswer, EvalRequest, Prompt

PROMPTS = [Prompt(prompt_id=i, epoch=0, source="chain", row=i, token_ids=[1, i], answer=str(i)) for i in range(10)]


def evaluate(config: EvalConfig, *, greedy: bool) -> tuple[dict[str, float], list[EvalRequest]]:
    """Sampled answers are right for even prompts, greedy ones for all."""
    asked: list[EvalRequest] = []

    async def ask(requests: list[EvalRequest], share: float) -> list[EvalAnswer]:
        asked.extend(requests)
        return [
            EvalAnswer(
                prompt_id=prompt.prompt_id,
                acc=float(request.sampling.temperature == 0 or prompt.prompt_id % 2 == 0),
                num_tokens=prompt.prompt_id,
                finish_reason="length" if prompt.prompt_id == 9 else "stop",
                version_min=3,
                version_max=4,
            )
            for request in requests
            for prompt in request.prompts
        ]

    evaluation = Evaluation(config, PROMPTS, chunk=4, max_tokens=7, seed=0, ask=ask)
    return asyncio.run(evaluation.run(greedy=greedy, share=0.5)), asked


def test_prompts_are_asked_in_chunks_with_ids_of_their_own() -> None:
    _, asked = evaluate(EvalConfig(num_prompts=10, num_greedy_prompts=5, temperature=0.8), greedy=True)
    assert [len(request.prompts) for request in asked] == [4, 4, 2, 4, 1]
    assert len({request.request_id for request in asked}) == 5
    assert [request.sampling.temperature for request in asked] == [0.8] * 3 + [0.0] * 2
    assert {request.sampling.max_tokens for request in asked} == {7}


def test_sampled_and_greedy_accuracy_are_told_apart() -> None:
    metrics, _ = evaluate(EvalConfig(num_prompts=10, num_greedy_prompts=5), greedy=True)
    assert metrics == {
        "eval/accuracy": 0.5,
        "eval/greedy_accuracy": 1.0,
        "eval/num_prompts": 10,
        "eval/response_tokens_mean": 4.5,
        "eval/truncated_ratio": 0.1,
        "eval/version_min": 3,
        "eval/version_max": 4,
    }


def test_in_the_middle_of_a_run_there_is_no_greedy_part() -> None:
    metrics, asked = evaluate(EvalConfig(num_prompts=8), greedy=False)
    assert "eval/greedy_accuracy" not in metrics
    assert len(asked) == 2


def test_every_evaluation_of_a_run_draws_the_same_random_numbers() -> None:
    config = EvalConfig(num_prompts=4)
    assert evaluate(config, greedy=False)[1][0].seed == evaluate(config, greedy=False)[1][0].seed


def test_without_prompts_nothing_is_asked() -> None:
    assert evaluate(EvalConfig(num_prompts=0, num_greedy_prompts=0), greedy=True) == ({}, [])
