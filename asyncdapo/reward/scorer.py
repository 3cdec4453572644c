"""Reward: the completions of one prompt in, one Score each out.

    token ids ──decode──▶ text ──pool──▶ verdict ──scale──▶ score ──overlong──▶ seq_reward ══▶ reward

    acc                           the verdict, 0 to 1
    score                         the verdict scaled to `reward.incorrect` … `reward.correct`
    overlong                      the soft overlong punishment: 0 to −`reward.overlong_penalty` (DAPO eq. 13)
    seq_reward, seq_final_reward  score + overlong: the reward, from which advantages are computed
    timed_out                     1 if the verifier took too long; the verdict is then 0
    any other                     the verifier's own metrics, as it returned them

Owns: the order of these steps and the names of the metrics; starts and stops its pool. Does not own: decoding (it is
passed in), what is right (the pool's verifier), which tokens bear loss (rollout), the advantage (the learner).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

from asyncdapo.algorithm.dapo import soft_overlong_punishment
from asyncdapo.errors import RewardError, VerdictError
from asyncdapo.messages import FinishReason, Prompt, Score
from asyncdapo.reward.config import RewardConfig
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.wire import METRICS, Verdict

Decode = Callable[[np.ndarray], str]
"""Token ids int32 [T] -> text without special tokens (no stop token at its end)."""


class Scorer:
    """Scores the completions of a prompt together: the control experiment needs the whole group."""

    def __init__(
        self,
        config: RewardConfig,
        pool: ScorerPool,
        decode: Decode,
        max_response_length: int,
        *,
        filter_metric: str | None = None,
    ) -> None:
        """`max_response_length`, in tokens: where the overlong punishment reaches its maximum. `filter_metric`: the
        metric that the filter compares, which every completion must have; None without a filter."""
        self._config = config
        self._pool = pool
        self._decode = decode
        self._max_response_length = max_response_length
        own = (filter_metric,) if filter_metric is not None and filter_metric not in METRICS else ()
        self._own_names: dict[str, None] = dict.fromkeys(own)
        """Names of the verifier's own metrics: the filter's, and those that it has returned so far."""

    async def start(self) -> None:
        """Start the verifier processes. Raises RunError if they can't be started."""
        await self._pool.start()

    async def stop(self) -> None:
        """End the verifier processes; returns when they are gone."""
        await self._pool.stop()

    def pids(self) -> list[int]:
        """Pids of the live verifier processes."""
        return self._pool.pids()

    def gauges(self) -> dict[str, float]:
        """Cumulative: `scorer_timeouts` (completions), `scorer_restarts` (processes)."""
        return self._pool.gauges()

    @property
    def num_judged(self) -> int:
        """Completions judged so far, of any prompt. While it rises, scoring makes progress."""
        return self._pool.num_verdicts

    async def __call__(
        self, prompt: Prompt, token_ids: Sequence[np.ndarray], finish_reasons: Sequence[FinishReason], seed: int
    ) -> list[Score]:
        """One Score per completion, in order. `seed`: the group's; only `reward.shuffle` uses it. It shuffles whole
        scores, so that a time-out still counts 0 and the length punishment teaches nothing either.

        A completion that the length limit cut off is judged by its text like any other. Raises RewardError if the
        verifier fails on one, VerdictError if it returns something that isn't a verdict, RunError if it can't be
        started.
        """
        texts = [self._decode(ids) for ids in token_ids]
        try:
            verdicts = await self._pool.verify(texts, prompt.answer)
        except (RewardError, VerdictError) as error:
            where = f"{prompt.source} row {prompt.row} (prompt {prompt.prompt_id})"
            failed = "failed" if isinstance(error, RewardError) else "broke its contract"
            raise type(error)(f"verifier {self._config.verifier!r} {failed} on {where}: {error}") from error
        for verdict in verdicts:
            self._own_names |= dict.fromkeys(verdict.metrics)
        punishments = self._punish([len(ids) for ids in token_ids])
        scores = [self._score(verdict, overlong) for verdict, overlong in zip(verdicts, punishments, strict=True)]
        if self._config.shuffle:
            random.Random(seed).shuffle(scores)
        return scores

    def _punish(self, lengths: list[int]) -> list[float]:
        """The length punishment of each completion: 0 or less."""
        config = self._config
        return soft_overlong_punishment(
            torch.tensor(lengths),
            max_length=self._max_response_length,
            buffer=config.overlong_buffer,
            penalty=config.overlong_penalty,
        ).tolist()

    def _score(self, verdict: Verdict, overlong: float) -> Score:
        score = scale(verdict.value, correct=self._config.correct, incorrect=self._config.incorrect)
        reward = score + overlong
        numbers = (verdict.value, score, reward, reward, float(verdict.timed_out), overlong)
        # After a time-out there are no metrics of the verifier; the filter needs those that the others have.
        own = dict.fromkeys(self._own_names, 0.0) if verdict.timed_out else verdict.metrics
        return Score(reward=reward, metrics=dict(zip(METRICS, numbers, strict=True)) | own, pred=verdict.pred)


def scale(acc: float, *, correct: float, incorrect: float) -> float:
    """Verdict 0..1 to `reward.incorrect`..`reward.correct`."""
    return incorrect + acc * (correct - incorrect)
