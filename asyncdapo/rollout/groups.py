"""Builds the group of a lease, and the answers of an evaluation, from samples and scores.

In: a lease or prompt, the engine's samples, the scorer's scores. Out: records of `messages` and their payload.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncdapo.errors import RewardError
from asyncdapo.eval_messages import EvalAnswer
from asyncdapo.messages import Completion, Context, FinishReason, Group, Lease, Prompt, Runs, Score
from asyncdapo.rollout.engine import Sample
from asyncdapo.transport.payload import LOGPROB_DTYPE, TOKEN_DTYPE, Payload, checksum

MAX_FAILURE = 500
"""Characters kept of a reward function's error: a header has to hold those of many answers."""


def build_group(
    lease: Lease,
    worker: int,
    samples: Sequence[Sample],
    scores: Sequence[Score],
    generate_s: float,
    *,
    overlong_filter: bool = False,
) -> tuple[Group, Payload]:
    """The scored group of a lease and its token buffers. Every sampled token bears loss, except those of a completion
    that overlong filtering leaves out."""
    completions = [
        Completion(
            contexts=[_context(lease.prompt, sample, overlong_filter)],
            finish_reason=sample.finish_reason,
            reward=score.reward,
            metrics=score.metrics,
        )
        for sample, score in zip(samples, scores, strict=True)
    ]
    group = Group(
        prompt_id=lease.prompt.prompt_id,
        lease_id=lease.lease_id,
        branch=lease.branch,
        attempt=lease.attempt,
        worker=worker,
        num_prompt_tokens=len(lease.prompt.token_ids),
        completions=completions,
        generate_s=generate_s,
    )
    payload = Payload(
        np.array(lease.prompt.token_ids, TOKEN_DTYPE),
        np.concatenate([sample.token_ids for sample in samples], dtype=TOKEN_DTYPE),
        np.concatenate([sample.logprobs for sample in samples], dtype=LOGPROB_DTYPE),
    )
    return group, payload


def _context(prompt: Prompt, sample: Sample, overlong_filter: bool) -> Context:
    bears_loss = loss_mask(len(sample.token_ids), sample.finish_reason, overlong_filter)
    return Context.of_turn(sample.versions, bears_loss, checksum([*prompt.token_ids, *sample.token_ids], 0))


def loss_mask(num_tokens: int, finish_reason: FinishReason, overlong_filter: bool) -> Runs:
    """Which of a completion's tokens bear loss, as run lengths: all of them, or none if `overlong_filter` is on and the
    length limit cut it off (overlong filtering, DAPO §3.4). A completion whose last allowed token is its stop token
    isn't cut off."""
    return [(int(not (overlong_filter and finish_reason == "length")), num_tokens)]


def build_answer(prompt: Prompt, number: int, sample: Sample, score: Score | RewardError, response: str) -> EvalAnswer:
    """The result of one evaluated completion, the prompt's `number`-th. Without a score it counts as wrong."""
    versions = [version for version, _ in sample.versions]
    failed = isinstance(score, RewardError)
    return EvalAnswer(
        prompt_id=prompt.prompt_id,
        sample=number,
        acc=0.0 if failed else score.metrics["acc"],
        failure=str(score)[:MAX_FAILURE] if failed else "",
        pred=None if failed else score.pred,
        response=response,
        num_tokens=len(sample.token_ids),
        finish_reason=sample.finish_reason,
        version_min=min(versions),
        version_max=max(versions),
    )
