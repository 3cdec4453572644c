"""Reward: the completions of one prompt in, one Score each out.

    token ids ──decode──▶ text ──verify──▶ verdict (acc) ──scale──▶ score ══▶ reward

Owns: the order of these steps and the names of the metrics. Does not own: tokens (decode is given), what is right
(verify is given), the advantage (the learner's).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from asyncdapo.errors import RewardError
from asyncdapo.messages import FinishReason, Prompt, Score
from asyncdapo.reward.config import RewardConfig
from asyncdapo.reward.registry import Verify

Decode = Callable[[np.ndarray], str]
"""Token ids int32 [T] -> text without special tokens (no stop token at its end)."""


METRICS = ("acc", "score", "seq_reward", "seq_final_reward")
"""Numbers of every score: the verdict, the verdict scaled, and twice the final reward, which is the scaled one."""


class Scorer:
    """Scores the completions of a prompt together, as the control experiment needs the whole group."""

    def __init__(self, config: RewardConfig, verify: Verify, decode: Decode) -> None:
        self._config = config
        self._verify = verify
        self._decode = decode

    async def __call__(
        self, prompt: Prompt, token_ids: Sequence[np.ndarray], finish_reasons: Sequence[FinishReason], seed: int
    ) -> list[Score]:
        """One Score per completion, in order. `seed` is the group's; only `reward.shuffle` draws from it.

        A completion cut off at the length limit is judged by its text like any other. Raises RewardError, with its
        cause, when the verifier raises.
        """
        verdicts = [self._verdict(prompt, self._decode(ids)) for ids in token_ids]
        if self._config.shuffle:
            random.Random(seed).shuffle(verdicts)
        return [self._score(verdict) for verdict in verdicts]

    def _verdict(self, prompt: Prompt, text: str) -> float:
        try:
            verdict = float(self._verify(text, prompt.answer))
            if not 0 <= verdict <= 1:
                raise ValueError(f"a verdict is a number from 0 to 1, got {verdict}")
            return verdict
        except Exception as error:  # whatever the user's function raises: it ends this prompt, and nothing else
            where = f"{prompt.source} row {prompt.row} (prompt {prompt.prompt_id})"
            problem = f"{type(error).__name__}: {error}"
            raise RewardError(f"verifier {self._config.verifier!r} raised on {where}: {problem}") from error

    def _score(self, acc: float) -> Score:
        score = scale(acc, self._config)
        return Score(reward=score, metrics=dict(zip(METRICS, (acc, score, score, score), strict=True)))


def scale(acc: float, config: RewardConfig) -> float:
    """Verdict 0..1 to `reward.incorrect`..`reward.correct`."""
    return config.incorrect + acc * (config.correct - config.incorrect)
