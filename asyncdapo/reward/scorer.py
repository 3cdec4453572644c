"""Reward: the completions of one prompt in, one Score each out.

    Scorer   token ids ──decode──▶ text ──pool──▶ verdict ──▶ Scale
    Scale    verdict ──scale──▶ score ──overlong──▶ seq_reward ══▶ reward

    acc                           the verdict: 0 to 1, or the sum of an environment's rewards
    score                         the verdict scaled to `reward.incorrect` … `reward.correct`
    overlong                      the soft overlong punishment: 0 to −`reward.overlong_penalty` (DAPO eq. 13)
    seq_reward, seq_final_reward  score + overlong: the reward, from which advantages are computed
    timed_out                     1 if the verifier, or a step of the environment, took too long; the verdict is then 0
    any other                     the verifier's or the environment's own metrics

Owns: the order of these steps and the names of the metrics; starts and stops its pool. Does not own: decoding (it is
passed in), what is right (the pool's verifier, an environment), which tokens bear loss (rollout), the advantage (the
learner).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from asyncdapo.algorithm.dapo import soft_overlong_punishment
from asyncdapo.errors import RewardError, VerdictError
from asyncdapo.messages import FinishReason, Prompt, Score
from asyncdapo.reward.config import RewardConfig
from asyncdapo.reward.judge import METRIC_NAME
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.wire import METRICS, Verdict

Decode = Callable[[np.ndarray], str]
"""Token ids int32 [T] -> text without special tokens (no stop token at its end)."""


class Played(Protocol):
    """An episode, as far as its scores depend on it."""

    @property
    def reward(self) -> float:
        """Sum of its rewards."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def num_sampled_tokens(self) -> int: ...

    @property
    def timed_out(self) -> bool: ...


class Scale:
    """Makes the scores of a group: the control experiment needs all of them together."""

    def __init__(self, config: RewardConfig, max_response_length: int, *, filter_metric: str | None = None) -> None:
        """`max_response_length`, in tokens: where the overlong punishment reaches its maximum. `filter_metric`: the
        metric that the filter compares, which every completion must have; None without a filter."""
        self._config = config
        self._max_response_length = max_response_length
        own = (filter_metric,) if filter_metric is not None and filter_metric not in METRICS else ()
        self._own_names: dict[str, None] = dict.fromkeys(own)
        """Names of metrics that aren't ours: the filter's, and those that came so far."""

    def scores(self, verdicts: Sequence[Verdict], num_tokens: Sequence[int], seed: int) -> list[Score]:
        """One Score per completion, in order. `num_tokens`: sampled ones of each. `seed`: the group's; only
        `reward.shuffle` uses it. It shuffles whole scores, so that a time-out still counts 0 and the length punishment
        teaches nothing either."""
        for verdict in verdicts:
            self._own_names |= dict.fromkeys(verdict.metrics)
        punishments = self._punish(num_tokens)
        scores = [self._score(verdict, overlong) for verdict, overlong in zip(verdicts, punishments, strict=True)]
        if self._config.shuffle:
            random.Random(seed).shuffle(scores)
        return scores

    def rate(self, episodes: Sequence[Played], seed: int) -> list[Score]:
        """The scores of episodes, whose verdicts are the sums of their rewards. One that took too long is wrong. Raises
        VerdictError for a metric that can't have its name."""
        for name in {name for episode in episodes for name in episode.metrics}:
            if name in METRICS or not METRIC_NAME.fullmatch(name):
                raise VerdictError(f"the environment's metric {name!r} needs another name; taken: {', '.join(METRICS)}")
        verdicts = [
            Verdict(0.0 if episode.timed_out else episode.reward, episode.timed_out, metrics=dict(episode.metrics))
            for episode in episodes
        ]
        return self.scores(verdicts, [episode.num_sampled_tokens for episode in episodes], seed)

    def _punish(self, lengths: Sequence[int]) -> list[float]:
        """The length punishment of each completion: 0 or less."""
        config = self._config
        if max(lengths, default=0) <= self._max_response_length - config.overlong_buffer:
            return [0.0] * len(lengths)  # most calls: tensors would cost more than all the rest of the score
        return soft_overlong_punishment(
            torch.tensor(list(lengths)),
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


class Scorer:
    """Has the completions of a prompt judged, and scores them together."""

    def __init__(self, verifier: str, pool: ScorerPool, decode: Decode, scale: Scale) -> None:
        self._verifier, self._pool, self._decode, self._scale = verifier, pool, decode, scale

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

    def account(self) -> dict[str, float]:
        """What the time of the verifiers goes into: see `ScorerPool.account`."""
        return self._pool.account()

    @property
    def num_judged(self) -> int:
        """Completions judged so far, of any prompt. While it rises, scoring makes progress."""
        return self._pool.num_verdicts

    async def __call__(
        self, prompt: Prompt, token_ids: Sequence[np.ndarray], finish_reasons: Sequence[FinishReason], seed: int
    ) -> list[Score]:
        """One Score per completion, in order. `seed`: as in `Scale.scores`.

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
            raise type(error)(f"verifier {self._verifier!r} {failed} on {where}: {error}") from error
        return self._scale.scores(verdicts, [len(ids) for ids in token_ids], seed)


def scale(acc: float, *, correct: float, incorrect: float) -> float:
    """Verdict 0..1 to `reward.incorrect`..`reward.correct`."""
    return incorrect + acc * (correct - incorrect)
