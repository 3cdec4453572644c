"""Evaluation: which requests are made, how many at a time, and what becomes of their answers."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncdapo.config.run import EvalConfig
from asyncdapo.controller.eval.evaluation import Answered, Evaluation
from asyncdapo.errors import ConfigError
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from asyncdapo.messages import Prompt
from asyncdapo.seeds import eval_seed, sample_seed

PROMPTS = [Prompt(prompt_id=i, epoch=0, source="chain", row=i, token_ids=[1, i], answer=str(i)) for i in range(10)]


def respond(request: EvalRequest) -> list[EvalAnswer]:
    """Sampled answers are right for even prompts, greedy ones for all."""
    return [
        EvalAnswer(
            prompt_id=prompt.prompt_id,
            sample=sample,
            acc=float(request.sampling.temperature == 0 or prompt.prompt_id % 2 == 0),
            pred=str(prompt.prompt_id),
            num_tokens=prompt.prompt_id,
            finish_reason="length" if prompt.prompt_id == 9 else "stop",
            version_min=3,
            version_max=4,
        )
        for prompt in request.prompts
        for sample in request.samples
    ]


async def answer_at_once(requests: list[EvalRequest]) -> list[EvalAnswer]:
    return [answer for request in requests for answer in respond(request)]


def make(config: EvalConfig, ask=answer_at_once, *, chunk=4, total_slots=8) -> Evaluation:
    return Evaluation(config, PROMPTS, chunk=chunk, total_slots=total_slots, max_tokens=7, seed=0, ask=ask)


def evaluate(config: EvalConfig, *, greedy: bool, known=(), **fleet) -> tuple[dict[str, float], list[EvalRequest]]:
    asked: list[EvalRequest] = []

    async def ask(requests: list[EvalRequest]) -> list[EvalAnswer]:
        asked.extend(requests)
        return await answer_at_once(requests)

    return asyncio.run(make(config, ask, **fleet).run(greedy=greedy, known=known)), asked


def sequences(requests: list[EvalRequest]) -> Counter[tuple[int, int, bool]]:
    return Counter(
        (prompt.prompt_id, sample, request.sampling.temperature == 0)
        for request in requests
        for prompt in request.prompts
        for sample in request.samples
    )


def test_prompts_are_asked_in_chunks_with_ids_of_their_own() -> None:
    _, asked = evaluate(EvalConfig(num_prompts=10, num_greedy_prompts=5, temperature=0.8), greedy=True)
    assert [len(request.prompts) for request in asked] == [4, 4, 2, 4, 1]
    assert len({request.request_id for request in asked}) == 5
    assert [request.sampling.temperature for request in asked] == [0.8] * 3 + [0.0] * 2
    assert {request.sampling.max_tokens for request in asked} == {7}


def test_the_samples_of_a_prompt_stay_together_where_a_request_has_room_for_them() -> None:
    _, asked = evaluate(EvalConfig(num_prompts=5, num_samples=2), greedy=False)
    assert [(len(request.prompts), request.samples) for request in asked] == [(2, [0, 1]), (2, [0, 1]), (1, [0, 1])]


def test_more_samples_than_a_request_holds_are_spread() -> None:
    _, asked = evaluate(EvalConfig(num_prompts=2, num_samples=5), greedy=False)
    spread = [([prompt.prompt_id for prompt in request.prompts], request.samples) for request in asked]
    assert spread == [([0], [0, 1, 2, 3]), ([1], [0, 1, 2, 3]), ([0, 1], [4])]


@given(
    num_prompts=st.integers(0, 12),
    num_samples=st.integers(1, 9),
    num_greedy=st.integers(0, 12),
    greedy=st.booleans(),
    chunk=st.integers(1, 9),
    known=st.sets(st.tuples(st.integers(0, 9), st.integers(0, 8), st.booleans())),
)
def test_every_completion_is_asked_for_once_unless_it_is_known(
    num_prompts, num_samples, num_greedy, greedy, chunk, known
) -> None:
    config = EvalConfig(num_prompts=num_prompts, num_samples=num_samples, num_greedy_prompts=num_greedy)
    wanted = sequences(evaluate(config, greedy=greedy)[1])
    assert set(wanted.values()) <= {1}
    assert len(wanted) == make(config).total(greedy=greedy)
    answered = [
        Answered(one, is_greedy)
        for request in evaluate(config, greedy=greedy)[1]
        for is_greedy in [request.sampling.temperature == 0]
        for one in respond(request)
        if (one.prompt_id, one.sample, is_greedy) in known
    ]
    metrics, asked = evaluate(config, greedy=greedy, known=answered, chunk=chunk)
    assert sequences(asked) == Counter({key: 1 for key in wanted if key not in known})
    assert all(request.num_sequences <= chunk for request in asked)
    assert metrics == evaluate(config, greedy=greedy)[0]


def test_a_completion_has_a_seed_of_its_own_and_the_first_that_of_a_single_one() -> None:
    seeds = {eval_seed(7, prompt_id, sample) for prompt_id in range(50) for sample in range(50)}
    assert len(seeds) == 2500
    assert eval_seed(7, 3, 0) == sample_seed(7, 3)


def test_sampled_and_greedy_accuracy_are_told_apart() -> None:
    metrics, _ = evaluate(EvalConfig(num_prompts=10, num_greedy_prompts=5), greedy=True)
    assert metrics.pop("eval/accuracy_stderr") == pytest.approx(0.5 / 3)
    assert metrics == {
        "eval/accuracy": 0.5,
        "eval/greedy_accuracy": 1.0,
        "eval/num_prompts": 10,
        "eval/response_tokens_mean": 4.5,
        "eval/response_tokens_max": 9,
        "eval/failed_answers": 0,
        "eval/truncated_ratio": 0.1,
        "eval/version_min": 3,
        "eval/version_max": 4,
    }


def test_answers_that_were_not_judged_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    async def ask(requests: list[EvalRequest]) -> list[EvalAnswer]:
        return [replace(one, acc=0.0, failure="the judge is down") for one in await answer_at_once(requests)]

    config = EvalConfig(num_prompts=6, num_greedy_prompts=2)
    metrics = asyncio.run(make(config, ask).run(greedy=True))
    assert metrics["eval/failed_answers"] == 8
    assert "8 of 8 answers weren't judged: the judge is down" in caplog.text


def test_in_the_middle_of_a_run_there_is_no_greedy_part() -> None:
    metrics, asked = evaluate(EvalConfig(num_prompts=8), greedy=False)
    assert "eval/greedy_accuracy" not in metrics
    assert len(asked) == 2


def test_every_evaluation_of_a_run_draws_the_same_random_numbers() -> None:
    config = EvalConfig(num_prompts=4)
    assert evaluate(config, greedy=False)[1][0].seed == evaluate(config, greedy=False)[1][0].seed


def test_without_prompts_nothing_is_asked() -> None:
    assert evaluate(EvalConfig(num_prompts=0, num_greedy_prompts=0), greedy=True) == ({}, [])


def test_several_samples_at_temperature_0_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.num_samples.*temperature 0"):
        EvalConfig(num_samples=2, temperature=0.0)
