"""Reward: the completions of one prompt in, one Score each out.

    token ids ──decode──▶ text ──pool──▶ verdict (acc) ──scale──▶ score ══▶ reward

Owns: the order of these steps and the names of the metrics; starts and stops its pool. Does not own: tokens (decode is
given), what is right (the pool's verifier), the advantage (the learner's).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from asyncdapo.errors import RewardError
from asyncdapo.messages import FinishReason, Prompt, Score
from asyncdapo.reward.config import RewardConfig
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.wire import Verdict

Decode = Callable[[np.ndarray], str]
"""Token ids int32 [T] -> text without special tokens (no stop token at its end)."""


METRICS = ("acc", "score", "seq_reward", "seq_final_reward", "timed_out")
"""Numbers of every score: the verdict, the verdict scaled, and twice the final reward, which is the scaled one; and
whether the verifier took too long, so that the verdict is 0."""


class Scorer:
    """Scores the completions of a prompt together, as the control experiment needs the whole group."""

    def __init__(self, config: RewardConfig, pool: ScorerPool, decode: Decode) -> None:
        self._config = config
        self._pool = pool
        self._decode = decode

    async def start(self) -> None:
        """Start the verifier processes. Raises RunError when they can't be."""
        await self._pool.start()

    async def stop(self) -> None:
        """End the verifier processes; returns when they are gone."""
        await self._pool.stop()

    def pids(self) -> list[int]:
        """Of the verifier processes that live now."""
        return self._pool.pids()

    def gauges(self) -> dict[str, float]:
        """Cumulative: `scorer_timeouts` (completions), `scorer_restarts` (processes)."""
        return self._pool.gauges()

    @property
    def num_judged(self) -> int:
        """Completions judged so far, of any prompt: while it rises, whoever waits for scores is getting on."""
        return self._pool.num_verdicts

    async def __call__(
        self, prompt: Prompt, token_ids: Sequence[np.ndarray], finish_reasons: Sequence[FinishReason], seed: int
    ) -> list[Score]:
        """One Score per completion, in order. `seed` is the group's; only `reward.shuffle` draws from it, and what it
        shuffles are whole verdicts: one that timed out is still 0.

        A completion cut off at the length limit is judged by its text like any other. Raises RewardError when the
        verifier fails on one, RunError when there is no process to run it in.
        """
        texts = [self._decode(ids) for ids in token_ids]
        try:
            verdicts = await self._pool.verify(texts, prompt.answer)
        except RewardError as error:
            where = f"{prompt.source} row {prompt.row} (prompt {prompt.prompt_id})"
            raise RewardError(f"verifier {self._config.verifier!r} failed on {where}: {error}") from error
        if self._config.shuffle:
            random.Random(seed).shuffle(verdicts)
        return [self._score(verdict) for verdict in verdicts]

    def _score(self, verdict: Verdict) -> Score:
        score = scale(verdict.value, self._config)
        numbers = (verdict.value, score, score, score, float(verdict.timed_out))
        return Score(reward=score, metrics=dict(zip(METRICS, numbers, strict=True)))


def scale(acc: float, config: RewardConfig) -> float:
    """Verdict 0..1 to `reward.incorrect`..`reward.correct`."""
    return config.incorrect + acc * (config.correct - config.incorrect)
