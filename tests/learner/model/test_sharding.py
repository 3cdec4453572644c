"""Shards in float32 behind passes in bfloat16: what they keep, gather and leave on disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from asyncdapo.errors import RunError
from asyncdapo.learner.batches.samples import Row
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.model import sharding
from asyncdapo.learner.model.packing import pack
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.model.sharding import gather, named_shards
from asyncdapo.learner.step.gradient import accumulate_gradient
from asyncdapo.learner.step.optimizer import Optimizer
from asyncdapo.learner.step.ranks import ALONE
from asyncdapo.learner.storage.checkpoint import AVERAGES
from asyncdapo.transport.payload import Payload
from tests.learner.tiny import (
    batch_of,
    make_batch,
    make_group,
    make_learner,
    make_row,
    save,
    save_tiny_llama,
    sharded,
    tiny_llama,
    train,
)

BF16_ERROR = 2.0**-8


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_bfloat16(**changes) -> Policy:
    return sharded(tiny_llama(**changes), dtype=torch.bfloat16)


def gradient_step(policy: Policy, rows: list[Row], max_tokens: int = 4096) -> None:
    accumulate_gradient(policy, rows, LossConfig(), max_tokens=max_tokens, ranks=ALONE)


def norm_of(policy: Policy) -> DTensor:
    return named_shards(policy)["model.norm.weight"]


def test_shards_have_the_loaded_weights_exactly_and_passes_compute_with_them_rounded() -> None:
    loaded, policy, rounded = tiny_llama(), in_bfloat16(), tiny_llama().to(torch.bfloat16)
    rounded.model.rotary_emb = tiny_llama().model.rotary_emb
    whole = {name: gather(shard) for name, shard in named_shards(policy).items()}
    assert equal(whole, {name: weight.detach() for name, weight in loaded.named_parameters()})
    micro_batch = pack([make_row(3, 9)], policy.device)
    with torch.no_grad():
        assert torch.equal(policy(micro_batch)[0], Policy(rounded)(micro_batch)[0])
        assert not torch.equal(policy(micro_batch)[0], Policy(loaded)(micro_batch)[0])
    assert {buffer.dtype for buffer in policy.buffers()} == {torch.float32}


def test_a_hundred_updates_far_below_the_resolution_of_bfloat16_add_up() -> None:
    policy = in_bfloat16()
    weight = gather(norm_of(policy))
    assert torch.equal(weight, torch.ones_like(weight))
    assert torch.equal((weight - 1e-6).to(torch.bfloat16), weight.to(torch.bfloat16))
    optimizer = Optimizer([norm_of(policy)], LearnerConfig(lr=1e-6), 1)
    for _ in range(100):
        norm_of(policy).grad = torch.ones_like(norm_of(policy))
        optimizer.update(loss=0.0)
    torch.testing.assert_close(1 - weight, torch.full_like(weight, 1e-4), rtol=2e-2, atol=0)


def test_averages_of_the_optimizer_are_float32() -> None:
    policy = in_bfloat16()
    gradient_step(policy, [make_row(3, 9)])
    optimizer = Optimizer(named_shards(policy).values(), LearnerConfig(), 1)
    optimizer.update(loss=0.0)
    assert optimizer.averages().keys() == set(AVERAGES)
    for averages in optimizer.averages().values():
        assert len(averages) == len(named_shards(policy))
        assert {average.dtype for average in averages.values()} == {torch.float32}


@pytest.mark.parametrize("gathered_bytes", [0, 1 << 30], ids=["blocks", "all at once"])
def test_gradients_of_many_micro_batches_are_summed_in_float32(monkeypatch, gathered_bytes) -> None:
    """In bfloat16 every one of the small ones would vanish beside the first."""
    monkeypatch.setattr(sharding, "GATHERED_BYTES", gathered_bytes)
    num_small, weight = 16, 2.0**-9
    large, small = make_row(3, 9, prompt=0), replace(make_row(3, 9), weight=weight)
    alone, many = in_bfloat16(), in_bfloat16()
    gradient_step(alone, [large])
    gradient_step(many, [large, *(replace(small, prompt=1 + number) for number in range(num_small))], max_tokens=12)
    one, sum_of_all = gather(norm_of(alone).grad), gather(norm_of(many).grad)
    torch.testing.assert_close(sum_of_all, one * (1 + num_small * weight), rtol=1e-2, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_float32_within_the_error_of_bfloat16(tied: bool) -> None:
    """That of a tied weight is the sum of its two, once."""
    plain, policy = sharded(tiny_llama(tie_word_embeddings=tied)), in_bfloat16(tie_word_embeddings=tied)
    for each in (plain, policy):
        gradient_step(each, [make_row(3, 9, prompt=0), make_row(2, 7, -1.0, prompt=1)], max_tokens=12)
    assert ("lm_head.weight" in named_shards(policy)) is not tied
    assert named_shards(policy).keys() == named_shards(plain).keys()
    for name, shard in named_shards(policy).items():
        gradient, expected = gather(shard.grad), gather(named_shards(plain)[name].grad)
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 16 * BF16_ERROR * expected.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_holds_the_float32_weights_bit_for_bit_and_is_the_same_whatever_the_model_computes_in(
    tmp_path, tied
):
    start = save_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    learner, plain = make_learner(start, dtype="bfloat16"), make_learner(start)
    files = [save(one, tmp_path / str(index), 0) for index, one in enumerate((learner, plain))]
    for name in ("model.safetensors", "config.json"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    assert json.loads((files[0] / "config.json").read_text())["dtype"] == "float32"
    train(learner, *make_batch())
    saved = load_file(save(learner, tmp_path / "0", 1) / "model.safetensors")
    assert equal(saved, learner.weights())
    assert not equal(saved, plain.weights())
    assert ("lm_head.weight" in saved) is not tied


def test_a_restored_bfloat16_learner_resumes_bit_for_bit(path, tmp_path) -> None:
    config = {"dtype": "bfloat16", "updates_per_step": 2, "weight_decay": 0.1}
    straight, restored = (make_learner(path, **config) for _ in range(2))
    train(straight, *make_batch(step=1))
    restored.restore(save(straight, tmp_path, 1))
    assert equal(straight.weights(), restored.weights())
    for learner in (straight, restored):
        train(learner, *make_batch(step=2))
    assert equal(straight.weights(), restored.weights())
    assert straight.digest() == restored.digest()


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_run_resumes_from_a_checkpoint_of_another_dtype(path, tmp_path, before, after) -> None:
    learner, other = make_learner(path, dtype=before), make_learner(path, dtype=after)
    train(learner, *make_batch(step=1))
    other.restore(save(learner, tmp_path, 1))
    assert equal(learner.weights(), other.weights())
    start = {name: weight.clone() for name, weight in other.weights().items()}
    for each in (learner, other):
        train(each, *make_batch(step=2))
    moved = [
        torch.cat([(weight - start[name]).flatten() for name, weight in each.weights().items()])
        for each in (learner, other)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.95, "averages of the optimizer got lost"


def test_a_checkpoint_of_another_model_is_refused_in_one_line_and_changes_nothing(path, tmp_path) -> None:
    wider = make_learner(save_tiny_llama(tmp_path / "wider", intermediate_size=64))
    deeper = make_learner(save_tiny_llama(tmp_path / "deeper", num_hidden_layers=3))
    learner, untouched = make_learner(path), make_learner(path)
    shape = r"its model.layers.0.mlp.gate_proj.weight has the shape \[64, 32\], the model one of \[48, 32\]"
    with pytest.raises(RunError, match=f"step-000000 can't be used: {shape}"):
        learner.restore(save(wider, tmp_path / "run", 0))
    with pytest.raises(RunError, match=r"step-000000 can't be used: lacks 9 weights \(model.layers.2"):
        deeper.restore(save(learner, tmp_path / "run", 0))
    assert equal(learner.weights(), untouched.weights())


def test_what_is_published_and_compared_are_the_float32_weights(path) -> None:
    learner = make_learner(path, dtype="bfloat16")
    weights, before = learner.weights(), learner.digest()
    assert {(weight.dtype, weight.requires_grad) for weight in weights.values()} == {(torch.float32, False)}
    assert "lm_head.weight" not in weights  # tied
    weights["model.norm.weight"][0] += 1e-6
    assert learner.digest() != before


def test_a_bfloat16_learner_makes_nearly_the_same_step_as_one_in_float32(path) -> None:
    learner, plain = (make_learner(path, dtype=dtype, loss=LossConfig(kl_coef=0.1)) for dtype in ("bfloat16", "auto"))
    for one, dtype in ((learner, torch.bfloat16), (plain, torch.float32)):
        reference = one._steps._first_pass.reference
        assert {shard.dtype for shard in named_shards(reference).values()} == {dtype}
    metrics, expected = (train(one, *make_batch(seed=3)) for one in (learner, plain))
    for name in ("learner/grad_norm", "learner/entropy", "learner/loss"):
        assert metrics[name] == pytest.approx(expected[name], rel=8 * BF16_ERROR, abs=1e-3), name


def test_a_bfloat16_learner_makes_rewarded_responses_likelier(path) -> None:
    learner = make_learner(path, dtype="bfloat16", lr=3e-3)
    prompt_ids, token_ids = torch.tensor([3, 1, 4]).int().numpy(), torch.arange(5, 13).int().numpy()
    pairs = [(prompt_ids, token_ids[:4], None), (prompt_ids, token_ids[4:], None)]
    sums = []
    for step in range(1, 6):
        logprobs = learner.logprobs(step - 1, pairs)
        sums.append([part.sum() for part in logprobs])
        group = make_group(0, 3, [4, 4], [1.0, -1.0], version=step - 1)
        payload = Payload(prompt_ids, token_ids, torch.cat([torch.from_numpy(part) for part in logprobs]).numpy())
        train(learner, batch_of([group], step), payload)
    assert sums[-1][0] - sums[0][0] > 0.5
    assert sums[-1][1] - sums[0][1] < -0.5
