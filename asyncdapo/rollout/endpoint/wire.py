"""What clients of the endpoint send and get: vLLM's route of token ids, OpenAI's list of models.

In: bodies of requests. Out: what is wanted, or `Refused`; answers as JSON. A call can't change how tokens are drawn:
the log-probs of training are of the run's own sampling. What merely differs from it is ignored and counted; what asks
for another form of answer is refused. Does not own: routes and keys (`endpoint`), conversations (`chat`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.endpoint.http import HttpAnswer, problem
from asyncdapo.rollout.engine import Sample

MODEL = "policy"
"""The model's name in lists and answers. Any name is accepted."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "seed": (),
}
"""Parameters that change which tokens are drawn, and the values at which they don't. null never does."""
REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stop": ([], ""),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
}
"""Parameters without which the client would get something other than it expects, and the values that do nothing."""

T = TypeVar("T")


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The client gets this instead of tokens."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.answer = problem(status, message, code)


class GenerateBody(Struct, frozen=True):
    """Of `POST /inference/v1/generate`."""

    token_ids: list[int]
    sampling_params: dict[str, Any] = {}
    stream: bool = False


class Asked(Struct, frozen=True):
    """What a call asks of the sampling."""

    max_tokens: int | None
    num_overrides: int
    """Parameters that differ from the run's own, which are used."""


def read_body(body: bytes, kind: type[T]) -> T:
    """Raises Refused."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(400, f"the body is no such request: {error}") from error


def read_sampling(params: Mapping[str, Any], run: Sampling) -> Asked:
    """Raises Refused for what can't be had."""
    for name, harmless in REFUSED.items():
        if (value := params.get(name)) is not None and value not in harmless:
            raise Refused(400, f"{name} isn't supported: a call is one sample of the model, up to its stop token")
    run_values = {"temperature": (run.temperature,), "top_p": (run.top_p,), "top_k": (run.top_k, 0, -1)}
    values = ((params.get(name), same) for name, same in (NEUTRAL | run_values).items())
    num_overrides = sum(value is not None and value not in same for value, same in values)
    wanted = params.get("max_completion_tokens") or params.get("max_tokens")
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise Refused(400, f"max_tokens is at least 1, got {wanted!r}")
    return Asked(max_tokens=wanted, num_overrides=num_overrides)


def models(max_context: int) -> HttpAnswer:
    """The one model."""
    model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "asyncdapo", "max_model_len": max_context}
    return json_answer({"object": "list", "data": [model]})


def generated(call_id: str, sample: Sample) -> HttpAnswer:
    """The sample, token by token. Clients read one or the other of `token` and `token_id`."""
    content = [
        {"token": f"token_id:{token}", "token_id": token, "logprob": logprob}
        for token, logprob in zip(sample.token_ids.tolist(), sample.logprobs.tolist(), strict=True)
    ]
    choice = {
        "index": 0,
        "finish_reason": sample.finish_reason,
        "token_ids": sample.token_ids.tolist(),
        "logprobs": {"content": content},
    }
    return json_answer({"request_id": call_id, "choices": [choice], "weight_versions": sample.versions})


def json_answer(content: Any) -> HttpAnswer:
    return HttpAnswer(body=msgspec.json.encode(content))
