"""The rules of the loss held against `vectors/dapo_vectors.json`, one test per vector.

`CHECKS` says which kinds are held here, `OTHERS` where the rest is, if anywhere; together they are all there are.
Comparison: |got − expected| <= tolerance · max(1, |expected|) element by element, in float64.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncdapo.dapo import clipped_loss, group_advantage, importance_ratio, token_mean
from asyncdapo.learner.model import entropy

VECTORS = json.loads((Path(__file__).parent / "vectors" / "dapo_vectors.json").read_text())["vectors"]


def kind(vector):
    """Group of a vector, and its variant or mode where the group has several."""
    inputs = vector["inputs"]
    name = inputs.get("variant") or (inputs.get("mode") if vector["group"] in ("agg", "advantage", "tis") else None)
    return f"{vector['group']}/{name}" if name else vector["group"]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def check_policy_loss(inputs, expected, close):
    assert inputs["loss_agg"] == "token-mean"
    mask_BT = tensor(inputs["mask"]).bool()
    logp_BT = tensor(inputs["logp"]).requires_grad_()
    ratio_BT = importance_ratio(logp_BT, tensor(inputs["old_logp"]), mask_BT)
    clipped = clipped_loss(
        ratio_BT,
        tensor(inputs["advantages"]),
        mask_BT,
        clip_low=inputs["clip_low"],
        clip_high=inputs["clip_high"],
        dual_clip=inputs["dual_clip_c"],
    )
    loss = token_mean(clipped.loss_BT, num_tokens=int(mask_BT.sum()))
    loss.backward()
    close(ratio_BT, expected["ratio"])
    close(clipped.loss_BT, expected["token_loss"])
    close(loss, expected["loss"])
    close(logp_BT.grad, expected["grad_logp"])
    for name in ("low", "high", "dual"):
        close(getattr(clipped, f"clipped_{name}_BT")[mask_BT].double().mean(), expected[f"clip_frac_{name}"])


def check_token_mean(inputs, expected, close):
    loss_NT = tensor(inputs["loss_mat"])
    mask_NT = torch.stack([tensor(mask) for mask in inputs["masks"]]).prod(0)
    num_tokens = int(mask_NT.sum())
    assert max(num_tokens, 1) == expected["denominator"]
    close(token_mean(loss_NT * mask_NT, num_tokens=num_tokens), expected["loss"])
    for split, contributions, rank_losses in zip(
        inputs["splits"], expected["contributions"], expected["rank_loss_for_mean_reduce"], strict=True
    ):
        for micro_batches, parts, rank_loss in zip(split["ranks"], contributions, rank_losses, strict=True):
            got = [token_mean((loss_NT * mask_NT)[rows], num_tokens=num_tokens) for rows in micro_batches]
            close(torch.stack(got), parts)
            close(len(split["ranks"]) * sum(got), rank_loss)


def check_group_advantage(inputs, expected, close):
    rewards_N, group_ids = tensor(inputs["rewards"]), np.array(inputs["group_ids"])
    advantages_N = torch.empty_like(rewards_N)
    for group_id in set(inputs["group_ids"]):
        members = torch.from_numpy(group_ids == group_id)
        advantages_N[members] = group_advantage(rewards_N[members], eps=inputs["eps"])
    close(advantages_N, expected["advantages"])
    zeros = [index for index, value in enumerate(expected["advantages"]) if value == 0.0]
    assert not advantages_N[zeros].any()


def check_entropy(inputs, expected, close):
    entropy_N = entropy((tensor(inputs["logits"]) / inputs["temperature"]).log_softmax(-1))
    close(entropy_N, expected["entropy"])
    close(entropy_N[tensor(inputs["mask"]).bool()].mean(), expected["mean_entropy"])


CHECKS = {
    "policy_loss/ppo": check_policy_loss,
    "agg/token-mean": check_token_mean,
    "advantage/grpo": check_group_advantage,
    "entropy": check_entropy,
}
"""Kind of vector -> what compares it: (inputs, expected, close)."""

NO_CODE = "no code for it"

OTHERS = {
    "policy_loss/gspo": NO_CODE,
    "policy_loss/cispo": NO_CODE,
    "policy_loss/decoupled": NO_CODE,
    "agg/token-sum": NO_CODE,
    "agg/seq-mean-token-sum": NO_CODE,
    "agg/seq-mean-token-mean": NO_CODE,
    "agg/seq-mean-token-sum-norm": NO_CODE,
    "agg/prompt-mean": NO_CODE,
    "advantage/grpo_no_std": NO_CODE,
    "advantage/rloo": NO_CODE,
    "overlong": NO_CODE,
    "kl": NO_CODE,
    "tis/truncate": NO_CODE,
    "tis/mask": NO_CODE,
    "eval": NO_CODE,
    "verifier": NO_CODE,
    "reward_scaling": "tests/reward/test_scorer.py",
    "filter": "tests/replay/test_filter.py",
    "dynamic_sampling": "tests/replay/test_dynamic_sampling_vectors.py",
}
"""Kind of vector -> the test that holds it, or that there is no code for it."""


@pytest.mark.parametrize("vector", [v for v in VECTORS if kind(v) in CHECKS], ids=lambda v: f"{kind(v)}: {v['name']}")
def test_the_vector_is_reproduced(vector):
    def close(got, expected):
        expected = np.array(expected, dtype=np.float64)
        error = np.abs(got.detach().double().numpy() - expected)
        assert (error <= vector["tolerance"] * np.maximum(1.0, np.abs(expected))).all(), (got, expected)

    CHECKS[kind(vector)](vector["inputs"], vector["expected"], close)


def test_every_kind_of_vector_is_held_here_or_listed():
    assert sorted({kind(vector) for vector in VECTORS}) == sorted([*CHECKS, *OTHERS])


def test_a_kind_held_elsewhere_has_its_test_there():
    for name, place in OTHERS.items():
        if place != NO_CODE:
            text = (Path(__file__).parents[1] / place).read_text()
            assert "dapo_vectors.json" in text, name
            assert f'"{name}"' in text, name
