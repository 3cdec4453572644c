"""Recorded log-probs against those that Hugging Face computes from the checkpoints of the recorded versions.

In: a finished run with payloads and a checkpoint of every step. Out: whether versions, rollout_logprobs, temperature
and transfer of weights are right, all in one: the recorded log-probs are those of the recorded versions, and not those
of the versions next to them. Needs `rollout.on_update=recompute`: a kept KV cache is of older weights.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from asyncdapo.learner.storage.checkpoint import checkpoint_dir
from asyncdapo.replay.ledger.ledger import read_group
from asyncdapo.transport.payload import expand


@dataclass(frozen=True)
class Recorded:
    """One context of a completion, whose versions have another before and after them."""

    completion: tuple[int, int]
    """Its group, and its place there."""
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    is_sampled: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    """Of each sampled token."""
    turn_ends: list[int]
    """Sampled tokens up to the end of each turn but the last."""

    @property
    def spans(self) -> bool:
        """Whether its tokens are of two versions or more."""
        return len(set(self.versions)) > 1

    @property
    def updated_between_turns(self) -> bool:
        """Whether new weights came after the end of a turn and before the next one began."""
        return any(self.versions[end - 1] != self.versions[end] for end in self.turn_ends)


def assert_versions_are_true(run_dir: Path, last_version: int, *, at_least: int, num: int = 32) -> None:
    """Of the completions that span versions there are `at_least` so many, and up to `num` of them are recomputed. Two
    may fit neighbouring versions as well: an answer that is certain has log-probs near 0 under each."""
    spanning = [one for one in recorded_contexts(run_dir, last_version) if one.spans][:num]
    assert len(spanning) >= at_least  # how many there are depends on how fast the two sides were
    assert num_shifted_apart(run_dir, last_version, spanning) >= len(spanning) - 2


def num_shifted_apart(run_dir: Path, last_version: int, contexts: Sequence[Recorded]) -> int:
    """How many of these log-probs don't fit the versions next to the recorded ones. All of them fit those."""
    models = [
        AutoModelForCausalLM.from_pretrained(checkpoint_dir(run_dir, step), dtype=torch.float32)
        for step in range(last_version + 1)
    ]
    num = 0
    for one in contexts:
        first, last = one.versions.min() - 1, one.versions.max() + 1
        whole = [recomputed(model, one.prompt_ids, one.token_ids) for model in models[first : last + 1]]
        table, labels, at = np.stack(whole)[:, one.is_sampled], one.versions - first, np.arange(len(one.versions))
        assert np.abs(table[labels, at] - one.logprobs).max() < 1e-3
        num += all(np.abs(table[labels + by, at] - one.logprobs).max() > 1e-2 for by in (-1, 1))
    return num


def recorded_contexts(run_dir: Path, last_version: int) -> list[Recorded]:
    """All recorded contexts with a version before and after theirs, the longest first: a short chain without a product
    is certain, its log-probs are near 0 under every version."""
    with sqlite3.connect(run_dir / "ledger.db") as ledger:
        rows = ledger.execute(
            "SELECT group_id FROM groups WHERE 0 < min_version AND max_version < ?", (last_version,)
        ).fetchall()
    found = []
    for (group_id,) in rows:
        group, payload = read_group(run_dir, group_id)
        for one in payload.of_contexts(group):
            ends = np.cumsum([turn.num_tokens for turn in one.header.turns])[:-1].tolist()
            response, is_sampled = one.own_ids[one.response], one.is_sampled[one.response]
            versions = expand(one.header.versions)
            found.append(
                Recorded((group_id, one.index), one.prompt_ids, response, is_sampled, one.logprobs_S, versions, ends)
            )
    return sorted(found, key=lambda one: -len(one.token_ids))


@torch.inference_mode()
def recomputed(model: torch.nn.Module, prompt_ids: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Log-prob of each response token [T] by a plain forward pass."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, token_ids]).astype(np.int64))
    logprobs = model(ids[None]).logits[0].log_softmax(-1)
    positions = torch.arange(len(prompt_ids) - 1, len(ids) - 1)
    return logprobs[positions, ids[positions + 1]].numpy()
