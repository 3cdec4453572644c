"""Builds the group of a lease, and the answers of an evaluation, from episodes and scores.

In: a lease or prompt, sampled episodes, their scores. Out: records of `messages` and their payload.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncdapo.errors import EpisodeError, RewardError
from asyncdapo.eval_messages import EvalAnswer
from asyncdapo.messages import Completion, Context, FinishReason, Group, Lease, Prompt, Runs, SampledTurn, Score
from asyncdapo.rollout.engine import joined
from asyncdapo.rollout.episodes import Decode, Episode, SampledContext
from asyncdapo.transport.payload import LOGPROB_DTYPE, TOKEN_DTYPE, Payload, Support

MAX_FAILURE = 500
"""Characters kept of a reward function's error: a header has to hold those of many answers."""


def build_group(
    lease: Lease,
    worker: int,
    episodes: Sequence[Episode],
    scores: Sequence[Score],
    generate_s: float,
    *,
    overlong_filter: bool = False,
) -> tuple[Group, Payload]:
    """The scored group of a lease and its token buffers. Every sampled token bears loss, except those of a completion
    that overlong filtering leaves out."""
    completions = [
        Completion(
            contexts=[_context(one, episode.finish_reason, overlong_filter) for one in episode.contexts],
            finish_reason=episode.finish_reason,
            reward=score.reward,
            metrics=score.metrics,
        )
        for episode, score in zip(episodes, scores, strict=True)
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
    contexts = [context for episode in episodes for context in episode.contexts]
    turns = [turn for context in contexts for turn in context.turns]
    payload = Payload(
        np.array(lease.prompt.token_ids, TOKEN_DTYPE),
        np.concatenate([context.token_ids for context in contexts], dtype=TOKEN_DTYPE),
        np.concatenate([turn.sample.logprobs for turn in turns], dtype=LOGPROB_DTYPE),
        Support.join([(turn.sample.support, len(turn.sample.logprobs)) for turn in turns]),
    )
    return group, payload


def _context(context: SampledContext, finish_reason: FinishReason, overlong_filter: bool) -> Context:
    sampled: Runs = []
    for turn in context.turns:
        if turn.observed:
            sampled.append((0, len(turn.observed)))
        sampled.append((1, len(turn.sample.token_ids)))
    return Context(
        rooted=context.rooted,
        sampled=joined(sampled),
        versions=joined([run for turn in context.turns for run in turn.sample.versions]),
        loss_mask=loss_mask(context.num_sampled_tokens, finish_reason, overlong_filter),
        turns=[SampledTurn(turn.number, len(turn.sample.token_ids), turn.checksum) for turn in context.turns],
    )


def loss_mask(num_tokens: int, finish_reason: FinishReason, overlong_filter: bool) -> Runs:
    """Which of a completion's sampled tokens bear loss, as run lengths: all of them, or none if `overlong_filter` is on
    and the length limit cut it off (overlong filtering, DAPO §3.4). A completion whose last allowed token is its stop
    token isn't cut off."""
    return [(int(not (overlong_filter and finish_reason == "length")), num_tokens)]


def build_answer(
    prompt: Prompt, number: int, episode: Episode, score: Score | RewardError, decode: Decode
) -> EvalAnswer:
    """The result of one evaluated completion, the prompt's `number`-th. Without a score it counts as wrong."""
    versions = [version for turn in episode.turns for version, _ in turn.sample.versions]
    parts = _transcript(episode, decode)
    failed = isinstance(score, RewardError)
    return EvalAnswer(
        prompt_id=prompt.prompt_id,
        sample=number,
        acc=0.0 if failed else score.metrics["acc"],
        failure=str(score)[:MAX_FAILURE] if failed else "",
        pred=None if failed else score.pred,
        metrics=dict(episode.metrics),
        response="".join(text for _, text in parts),
        sampled=[(whose, len(text)) for whose, text in parts] if len(parts) > 1 else [],
        num_tokens=episode.num_sampled_tokens,
        finish_reason=episode.finish_reason,
        version_min=min(versions),
        version_max=max(versions),
    )


def _transcript(episode: Episode, decode: Decode) -> list[tuple[int, str]]:
    """Responses (1) and observations (0), in order."""
    return [
        (whose, decode(np.array(token_ids, TOKEN_DTYPE)))
        for turn in episode.turns
        for whose, token_ids in ((0, turn.observed), (1, turn.sample.token_ids))
        if whose or len(token_ids)
    ]


def build_failure(prompt: Prompt, number: int, error: EpisodeError, version: int) -> EvalAnswer:
    """The result of an episode whose environment failed: it counts as wrong, and has no tokens. `version`: that of the
    weights in use."""
    return EvalAnswer(
        prompt_id=prompt.prompt_id,
        sample=number,
        acc=0.0,
        failure=str(error)[:MAX_FAILURE],
        num_tokens=0,
        finish_reason="stop",
        version_min=version,
        version_max=version,
    )
