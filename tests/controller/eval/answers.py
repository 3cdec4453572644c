"""Answers of an evaluation for the tests, made up."""

from __future__ import annotations

from collections.abc import Sequence

from asyncdapo.controller.eval.evaluation import Answered
from asyncdapo.eval_messages import EvalAnswer
from asyncdapo.messages import Prompt


def prompt(prompt_id: int, source: str = "made") -> Prompt:
    return Prompt(prompt_id=prompt_id, epoch=0, source=source, row=10 + prompt_id, token_ids=[1], answer=f"{prompt_id}")


def text(prompt_id: int) -> str:
    """What the model was given."""
    return f"<bos>What is {prompt_id}?"


def answered(
    prompt_id: int,
    sample: int = 0,
    *,
    greedy: bool = False,
    acc: float = 1.0,
    failure: str = "",
    response: str = "So.\nAnswer: 1",
    pred: str | None = "1",
    cut: bool = False,
    num_tokens: int = 7,
    parts: Sequence[tuple[int, str]] = (),
) -> Answered:
    """`parts`: of an episode, in place of `response`."""
    answer = EvalAnswer(
        prompt_id=prompt_id,
        sample=sample,
        acc=acc,
        failure=failure,
        pred=pred,
        num_tokens=num_tokens,
        finish_reason="length" if cut else "stop",
        version_min=3,
        version_max=4,
        response="".join(text for _, text in parts) if parts else response,
        sampled=[(whose, len(text)) for whose, text in parts],
    )
    return Answered(answer, greedy)
