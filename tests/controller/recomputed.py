"""Recorded log-probs against those that Hugging Face computes from the checkpoints of the recorded versions.

In: a finished run with payloads and a checkpoint of every step. Out: whether versions, rollout_logprobs, temperature
and transfer of weights are right, all in one: the recorded log-probs are those of the recorded versions, and not those
of the versions next to them. Needs `rollout.on_update=recompute`: a kept KV cache is of older weights.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from asyncdapo.learner.storage.checkpoint import checkpoint_dir
from asyncdapo.replay.ledger.ledger import read_group


def assert_versions_are_true(run_dir: Path, last_version: int, *, at_least: int, num: int = 32) -> None:
    """Of the completions that span versions there are `at_least` so many, and up to `num` of them are recomputed. Two
    may fit neighbouring versions as well: an answer that is certain has log-probs near 0 under each."""
    models = [
        AutoModelForCausalLM.from_pretrained(checkpoint_dir(run_dir, step), dtype=torch.float32)
        for step in range(last_version + 1)
    ]
    completions = spanning_completions(run_dir, last_version, num)
    assert len(completions) >= at_least  # how many there are depends on how fast the two sides were
    num_shifted_apart = 0
    for prompt_ids, token_ids, is_sampled, logprobs, versions in completions:
        first, last = versions[0][0] - 1, versions[-1][0] + 1
        table = np.stack([recomputed(model, prompt_ids, token_ids)[is_sampled] for model in models[first : last + 1]])
        labels = np.repeat([version - first for version, _ in versions], [count for _, count in versions])
        at = np.arange(len(logprobs))
        assert np.abs(table[labels, at] - logprobs).max() < 1e-3
        num_shifted_apart += all(np.abs(table[labels + by, at] - logprobs).max() > 1e-2 for by in (-1, 1))
    assert num_shifted_apart >= len(completions) - 2


def spanning_completions(run_dir: Path, last_version: int, num: int) -> list[tuple]:
    """The longest recorded completions whose tokens are of two versions or more, each with a version before and after.

    The longest, because a short chain without a product is certain: its log-probs are near 0 under every version.
    """
    with sqlite3.connect(run_dir / "ledger.db") as ledger:
        rows = ledger.execute(
            "SELECT group_id FROM groups WHERE 0 < min_version AND min_version < max_version AND max_version < ?",
            (last_version,),
        ).fetchall()
    found = []
    for (group_id,) in rows:
        group, payload = read_group(run_dir, group_id)
        for one in payload.of_contexts(group):
            if len(one.header.versions) > 1:
                found.append((one.prompt_ids, one.own_ids, one.is_sampled, one.logprobs_S, one.header.versions))
    return sorted(found, key=lambda completion: -len(completion[1]))[:num]


@torch.inference_mode()
def recomputed(model: torch.nn.Module, prompt_ids: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Log-prob of each response token [T] by a plain forward pass."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, token_ids]).astype(np.int64))
    logprobs = model(ids[None]).logits[0].log_softmax(-1)
    positions = torch.arange(len(prompt_ids) - 1, len(ids) - 1)
    return logprobs[positions, ids[positions + 1]].numpy()
