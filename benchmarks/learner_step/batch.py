"""The batch that every variant trains on, as a file: ours reads it as Batch and Payloads, others as plain arrays.

    lengths ──make──▶ BatchFile (random tokens, rewards) ──check process──▶ with μ and advantages ──▶ each variant

Invariant: the file alone says what is trained on, so all variants have the same tokens, log-probs μ and advantages.
Does not own: lengths, what the loss is.

Shapes: N sequences, group after group; K groups; P prompt tokens of all groups, R response tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group
from asyncdapo.shares import Batch, Dealer
from asyncdapo.transport.payload import Payload
from benchmarks.learner_step.lengths import GroupLengths


@dataclass(frozen=True)
class BatchFile:
    """Arrays of a batch; groups have equally many sequences. An `.npz` file has them under these names."""

    num_prompt_K: np.ndarray
    """int64: lengths of the prompts."""
    num_response_N: np.ndarray
    """int64: lengths of the responses."""
    prompt_ids_P: np.ndarray
    """int32"""
    response_ids_R: np.ndarray
    """int32"""
    rewards_N: np.ndarray
    """float64: 1 and -1, both in every group of two or more."""
    logprobs_R: np.ndarray
    """float32: μ, which the ratio is taken against."""
    advantages_N: np.ndarray
    """float64"""

    @property
    def group_size(self) -> int:
        return len(self.num_response_N) // len(self.num_prompt_K)

    def save(self, path: Path) -> None:
        np.savez(path, **asdict(self))

    @staticmethod
    def load(path: str | Path) -> BatchFile:
        with np.load(path) as arrays:
            return BatchFile(**arrays)

    def sampled_by(self, logprobs_R: np.ndarray, advantages_N: np.ndarray) -> BatchFile:
        return replace(self, logprobs_R=logprobs_R.astype(np.float32), advantages_N=advantages_N)

    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prompt and response ids of each sequence."""
        prompts = np.split(self.prompt_ids_P, self.num_prompt_K.cumsum()[:-1])
        responses = np.split(self.response_ids_R, self.num_response_N.cumsum()[:-1])
        return [(prompts[index // self.group_size], response) for index, response in enumerate(responses)]


def make(lengths: Sequence[GroupLengths], vocab_size: int, seed: int) -> BatchFile:
    """Random tokens and rewards of these lengths; μ and advantages are still to come."""
    rng = np.random.default_rng(seed)
    group_size = len(lengths[0].num_responses_G)
    num_prompt_K = np.array([group.num_prompt for group in lengths])
    num_response_N = np.array([num_tokens for group in lengths for num_tokens in group.num_responses_G])
    right_KG = rng.random((len(lengths), group_size)) < 0.5
    right_KG[:, 0], right_KG[:, -1] = True, group_size == 1
    return BatchFile(
        num_prompt_K,
        num_response_N,
        rng.integers(0, vocab_size, num_prompt_K.sum(), dtype=np.int32),
        rng.integers(0, vocab_size, num_response_N.sum(), dtype=np.int32),
        np.where(right_KG.reshape(-1), 1.0, -1.0),
        np.zeros(num_response_N.sum(), np.float32),
        np.zeros(len(num_response_N)),
    )


def messages_of(file: BatchFile) -> tuple[Batch, list[Payload]]:
    """As the learner gets it, for step 1: sampled with the initial model."""
    groups = []
    for place, num_prompt in enumerate(file.num_prompt_K.tolist()):
        ours = slice(place * file.group_size, (place + 1) * file.group_size)
        completions = [
            Completion(
                contexts=[Context.of_turn([(0, num_tokens)], [(1, num_tokens)], NO_CHECKSUM)],
                finish_reason="stop",
                reward=reward,
                metrics={},
            )
            for num_tokens, reward in zip(
                file.num_response_N[ours].tolist(), file.rewards_N[ours].tolist(), strict=True
            )
        ]
        groups.append(
            Group(
                prompt_id=place,
                lease_id=place,
                branch=0,
                attempt=0,
                worker=0,
                num_prompt_tokens=num_prompt,
                completions=completions,
                generate_s=0.0,
            )
        )
    batch = Batch(step=1, branch=0, max_staleness=0, groups=groups, deal=Dealer().deal(groups))
    prompts = np.split(file.prompt_ids_P, np.cumsum(file.num_prompt_K)[:-1])
    ends = np.cumsum(file.num_response_N)[file.group_size - 1 :: file.group_size][:-1]
    return batch, list(map(Payload, prompts, np.split(file.response_ids_R, ends), np.split(file.logprobs_R, ends)))
