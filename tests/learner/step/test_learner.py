"""Train steps on a tiny model: what is checked before, what is learned, what is reported."""

import dataclasses
import math

import msgspec
import numpy as np
import pytest
import torch

from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.errors import ConfigError, RunError, StalenessError
from asyncdapo.learner.batches.samples import rows_by_update
from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.model.packing import pack
from asyncdapo.learner.model.policy import Policy
from asyncdapo.transport.payload import Payload
from tests.learner.tiny import (
    CUT,
    MEASURED,
    batch_of,
    make_batch,
    make_group,
    make_learner,
    payloads_of,
    save_tiny_llama,
    tiny_llama,
    train,
)
from tests.payloads import joined, split


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def weights_of(learner):
    return torch.cat([weight.flatten() for weight in learner.weights().values()]).clone()


def with_logprobs(payload, logprobs):
    return dataclasses.replace(payload, logprobs=logprobs)


def test_a_group_past_the_staleness_bound_is_never_trained(path):
    learner = make_learner(path, staleness_bound=1)
    for step in (1, 2, 3):
        train(learner, *make_batch(step, version=max(0, step - 2)))
    before = weights_of(learner)
    batch, payload = make_batch(step=4, version=2)
    lengths = [completion.num_tokens for completion in batch.groups[2].completions]
    stale = make_group(77, batch.groups[2].num_prompt_tokens, lengths, [0.0, 1.0, 0.5], version=1)
    groups = [*batch.groups[:2], stale, *batch.groups[3:]]
    with pytest.raises(StalenessError, match="prompt 77 in batch 4 has staleness 2, the bound is 1"):
        train(learner, msgspec.structs.replace(batch, groups=groups), payload)
    assert torch.equal(weights_of(learner), before)
    assert learner.version == 3


def test_a_group_from_weights_that_do_not_exist_yet_is_refused(path):
    with pytest.raises(RunError, match="version 1, which does not exist yet"):
        train(make_learner(path), *make_batch(step=1, version=1))


def test_a_batch_dealt_to_more_ranks_than_there_are_is_refused(path):
    learner, (batch, payload) = make_learner(path), make_batch()
    dealt = batch_of(batch.groups, num_ranks=2)
    with pytest.raises(RunError, match="batch 1 is dealt to more ranks than the learner's 1"):
        learner.train(learner.prepare(dealt, payloads_of(dealt, payload, 0)))


def test_batches_out_of_order_are_refused(path):
    with pytest.raises(RunError, match="batch 2 reached a learner whose weights are of version 0"):
        train(make_learner(path, staleness_bound=9), *make_batch(step=2, version=0))


def test_the_same_batches_give_the_same_weights_bit_for_bit(path):
    def run():
        learner = make_learner(path, updates_per_step=2, tokens_per_microbatch=50)
        metrics = [train(learner, *make_batch(step, seed=step)) for step in (1, 2, 3)]
        return weights_of(learner), [line["learner/loss"] for line in metrics]

    (first, first_losses), (second, second_losses) = run(), run()
    assert torch.equal(first, second)
    assert first_losses == second_losses


def test_rewarded_responses_become_likelier(path):
    """Two responses to one prompt, rewarded +1 and -1, with the recorded log-probs of the model itself."""
    learner = make_learner(path, lr=3e-3)
    group = make_group(0, 3, [4, 4], [1.0, -1.0])
    payload = Payload(
        prompt_ids=np.array([3, 1, 4], np.int32),
        token_ids=np.array([5, 9, 2, 6, 7, 8, 10, 11], np.int32),
        logprobs=np.zeros(8, np.float32),
    )

    def logprobs(batch):
        model = tiny_llama()
        model.load_state_dict(learner.weights(), strict=False)
        rows = rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("grpo"))[0]
        packed = pack(rows, model.device)
        with torch.no_grad():
            logp_BT, _ = Policy(model)(packed)
        return logp_BT[packed.loss_mask_BT].numpy()

    batch = batch_of([group])
    before = logprobs(batch)
    for step in range(1, 6):
        group = make_group(0, 3, [4, 4], [1.0, -1.0], version=step - 1)
        batch = batch_of([group], step)
        train(learner, batch, with_logprobs(payload, logprobs(batch)))
    gained = logprobs(batch) - before
    assert gained[:4].sum() > 0.5
    assert gained[4:].sum() < -0.5


def test_a_train_step_reports_its_metrics(path):
    learner = make_learner(path, lr=2e-3, warmup_steps=4, tokens_per_microbatch=40, updates_per_step=2)
    batch, payload = make_batch(seed=5)
    metrics = train(learner, batch, payload)
    num_tokens = sum(group.num_tokens for group in batch.groups)
    num_prompt_tokens = sum(group.num_prompt_tokens * len(group.completions) for group in batch.groups)
    num_computed = num_tokens + sum(group.num_prompt_tokens - len(group.completions) for group in batch.groups)
    assert metrics["learner/tokens"] == num_tokens
    assert metrics["learner/forward_tokens"] >= num_computed
    shared = 1 - metrics["learner/forward_tokens"] / (num_tokens + num_prompt_tokens)
    assert metrics["learner/shared_ratio"] == pytest.approx(shared)
    assert metrics["learner/lr"] == pytest.approx(1e-3)
    assert metrics["learner/bad_updates"] == 0
    assert metrics["learner/train_s"] > 0
    assert 0 < metrics["learner/entropy"] < math.log(29)
    assert metrics["learner/grad_norm"] > 0
    assert metrics["learner/k3"] > 0
    assert 0 < metrics["learner/clip_low_ratio"] + metrics["learner/clip_high_ratio"] < 1
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert learner.version == 1


def test_metrics_do_not_depend_on_the_micro_batch_size(path):
    whole, parts = (
        train(make_learner(path, tokens_per_microbatch=size, loss=LossConfig(dual_clip=1.5)), *make_batch(seed=6))
        for size in (10_000, 1)
    )
    for name in whole.keys() - MEASURED - CUT:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name
    assert parts["learner/shared_ratio"] < whole["learner/shared_ratio"]


def test_a_bad_update_is_skipped_counted_and_left_out_of_the_means(path):
    learner = make_learner(path, updates_per_step=2)
    batch, payload = make_batch(seed=7)
    half = sum(group.num_tokens for group in batch.groups[:2])
    logprobs = payload.logprobs.copy()
    logprobs[3] = np.nan
    metrics = train(learner, batch, with_logprobs(payload, logprobs))
    assert metrics["learner/bad_updates"] == 1
    assert math.isfinite(metrics["learner/loss"])
    after_one_good_update = weights_of(learner)

    good_half = joined(split(payload, batch.groups)[2:])
    assert len(good_half.token_ids) == len(payload.token_ids) - half
    other = make_learner(path)
    other_metrics = train(other, msgspec.structs.replace(batch, groups=batch.groups[2:]), good_half)
    assert torch.equal(weights_of(other), after_one_good_update)
    assert other_metrics["learner/loss"] == metrics["learner/loss"]


def test_a_second_epoch_goes_over_the_same_batch_again(path):
    twice, once = make_learner(path, epochs=2), make_learner(path)
    metrics = train(twice, *make_batch(seed=8))
    batch, payload = make_batch(seed=8)
    train(once, batch, payload)
    assert metrics["learner/tokens"] == 2 * sum(group.num_tokens for group in batch.groups)
    after_one = weights_of(once)
    once.version = 0
    train(once, batch, payload)
    assert torch.equal(weights_of(twice), weights_of(once))
    assert not torch.equal(weights_of(once), after_one)


def test_the_proximal_policy_is_that_of_the_start_of_the_step_in_every_update(path):
    """In the first update the ratio to it is 1, in the second it is not: clip widths of 0 clip the tokens there."""
    loss = LossConfig(anchor="proximal", clip_low=0.0, clip_high=0.0)
    single = train(make_learner(path, loss=loss), *make_batch(seed=9))
    double = train(make_learner(path, loss=loss, epochs=2, lr=1e-2), *make_batch(seed=9))

    def clipped(metrics):
        return metrics["learner/clip_low_ratio"] + metrics["learner/clip_high_ratio"]

    assert clipped(single) == 0
    assert 0.1 < clipped(double) < 0.5
    assert single["learner/correction_mean"] == pytest.approx(double["learner/correction_mean"], rel=1e-5)


def test_the_reference_model_is_the_initial_one_unless_another_is_given(path, tmp_path):
    loss = LossConfig(kl_coef=0.1)
    learner = make_learner(path, loss=loss)
    assert train(learner, *make_batch(step=1))["learner/kl"] == pytest.approx(0, abs=1e-6)
    assert train(learner, *make_batch(step=2))["learner/kl"] > 1e-5
    other = make_learner(path, loss=loss, reference=save_tiny_llama(tmp_path, seed=1))
    assert train(other, *make_batch(step=1))["learner/kl"] > 0.1


def test_tokens_outside_the_outlier_band_are_masked_and_counted(path):
    batch, payload = make_batch(seed=10)
    logprobs = payload.logprobs.copy()
    logprobs[:5] = -40.0
    learner = make_learner(path, loss=LossConfig(outlier_band=(1e-6, 1e6)))
    metrics = train(learner, batch, with_logprobs(payload, logprobs))
    assert metrics["learner/masked_ratio"] == pytest.approx(5 / len(logprobs))
    assert metrics["learner/tokens"] == len(logprobs) - 5
    assert "learner/masked_ratio" not in train(make_learner(path), batch, payload)


@pytest.mark.parametrize("variant", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("anchor", ["behavior", "proximal"])
def test_every_variant_trains_around_either_anchor(path, variant, anchor):
    loss = LossConfig(variant=variant, anchor=anchor, clip_low=0.2, clip_high=0.28)
    learner = make_learner(path, loss=loss, updates_per_step=2)
    before = weights_of(learner)
    metrics = train(learner, *make_batch(seed=12))
    assert all(math.isfinite(value) for value in metrics.values())
    assert not torch.equal(weights_of(learner), before)


def test_a_step_whose_updates_are_all_skipped_has_no_means(path):
    learner = make_learner(path, max_bad_updates=1)
    before = weights_of(learner)
    batch, payload = make_batch()
    metrics = train(learner, batch, with_logprobs(payload, np.full_like(payload.logprobs, np.nan)))
    assert math.isnan(metrics["learner/loss"])
    assert metrics["learner/lr"] == 0.0
    assert torch.equal(weights_of(learner), before)
    batch, payload = make_batch(step=2)
    with pytest.raises(RunError, match="learner.max_bad_updates is 1"):
        train(learner, batch, with_logprobs(payload, np.full_like(payload.logprobs, np.nan)))


@pytest.mark.parametrize("masks", [{"outlier_band": (0.5, 2.0)}, {"anchor": "proximal", "correction_mode": "mask"}])
def test_what_is_not_a_number_ends_the_run_where_tokens_are_masked_by_their_ratio_too(path, masks):
    learner = make_learner(path, loss=LossConfig(**masks), max_bad_updates=1)
    batch, payload = make_batch(step=1)
    nothing = np.full_like(payload.logprobs, np.nan)
    assert train(learner, batch, with_logprobs(payload, nothing))["learner/bad_updates"] == 1
    with pytest.raises(RunError, match="learner.max_bad_updates is 1"):
        train(learner, *make_batch(step=2)[:1], with_logprobs(payload, nothing))


def test_a_reference_model_with_fewer_tokens_is_refused(path, tmp_path):
    small = save_tiny_llama(tmp_path, vocab_size=11)
    with pytest.raises(ConfigError, match="model.reference: has a vocabulary of 11, the model one of 29"):
        make_learner(path, loss=LossConfig(kl_coef=0.1), reference=small)


def test_weights_are_the_live_master_weights_with_tied_ones_once(path):
    learner = make_learner(path)
    weights = learner.weights()
    assert "lm_head.weight" not in weights  # tied
    assert {(weight.dtype, weight.requires_grad) for weight in weights.values()} == {(torch.float32, False)}
    before = weights_of(learner)
    train(learner, *make_batch(step=1))
    assert not torch.equal(torch.cat([weight.flatten() for weight in weights.values()]), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_where_there_is_none_is_a_config_error(path):
    with pytest.raises(ConfigError, match="learner.device: there is no GPU here"):
        make_learner(path, device="cuda")
