"""float32 weights behind a model that computes in bfloat16: what they keep, gather and leave on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from asyncdapo.errors import RunError
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.model.fp32_weights import Masters
from asyncdapo.learner.step.optimizer import Optimizer
from asyncdapo.transport.payload import Payload
from tests.learner.tiny import batch_of, make_batch, make_group, make_learner, save_tiny_llama, tiny_llama, train

BF16_ERROR = 2.0**-8


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    tokens_BT = torch.arange(20).reshape(2, 10)
    return model(tokens_BT, labels=tokens_BT, use_cache=False).loss.float()


def test_masters_have_the_loaded_weights_exactly_and_the_model_computes_with_them_rounded() -> None:
    loaded, model = tiny_llama(), tiny_llama()
    masters = Masters(model, torch.bfloat16)
    assert equal(masters.named(), {name: weight.detach() for name, weight in loaded.named_parameters()})
    for rounded, weight in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(rounded, weight.to(torch.bfloat16))
    assert any(not torch.equal(weight, weight.to(torch.bfloat16).float()) for weight in loaded.parameters())
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_thousand_updates_far_below_the_resolution_of_bfloat16_add_up() -> None:
    model = tiny_llama()
    masters = Masters(model, torch.bfloat16)
    weight = masters.named()["model.norm.weight"]
    assert torch.equal(weight, torch.ones_like(weight))
    assert torch.equal((weight - 1e-6).to(torch.bfloat16), weight.to(torch.bfloat16))
    optimizer = Optimizer(masters.parameters, LearnerConfig(lr=1e-6))
    for _ in range(1000):
        for parameter in masters.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.update(loss=0.0)
        masters.refresh()
    torch.testing.assert_close(1 - weight, torch.full_like(weight, 1e-3), rtol=2e-2, atol=0)
    assert torch.equal(model.model.norm.weight, weight.to(torch.bfloat16))


def test_averages_of_the_optimizer_are_float32() -> None:
    model = tiny_llama()
    masters = Masters(model, torch.bfloat16)
    loss_of(model).backward()
    optimizer = Optimizer(masters.parameters, LearnerConfig())
    optimizer.update(loss=0.0)
    states = optimizer.state_dict()["adamw"]["state"].values()
    assert len(states) == len(list(model.parameters()))
    assert {state[name].dtype for state in states for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_gradients_of_many_micro_batches_are_summed_in_float32() -> None:
    """In bfloat16 every one of the small ones would vanish beside the first."""
    model = tiny_llama()
    masters = Masters(model, torch.bfloat16)
    place = [name for name, _ in model.named_parameters()].index("model.norm.weight")
    for scale in [1.0] + [2.0**-10] * 1000:
        (model.model.norm.weight * scale).sum().backward()
        assert model.model.norm.weight.grad is None
    grad = masters.parameters[place].grad
    assert torch.equal(grad, torch.full_like(grad, 1 + 1000 * 2.0**-10))


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_float32_within_the_error_of_bfloat16(tied: bool) -> None:
    """That of a tied weight is the sum of its two, once."""
    plain, model = (tiny_llama(tie_word_embeddings=tied) for _ in range(2))
    masters = Masters(model, torch.bfloat16)
    for each in (plain, model):
        for _ in range(2):
            loss_of(each).backward()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert len(masters.parameters) == len(list(plain.parameters()))
    for master, parameter in zip(masters.parameters, plain.parameters(), strict=True):
        assert master.grad.dtype == torch.float32
        assert (master.grad - parameter.grad).norm() < 16 * BF16_ERROR * parameter.grad.norm()


def test_in_float32_the_parameters_of_the_model_are_the_masters() -> None:
    model = tiny_llama()
    masters = Masters(model, torch.float32)
    assert all(one is other for one, other in zip(masters.parameters, model.parameters(), strict=True))
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.double()
    assert {weight.dtype for weight in masters.named().values()} == {torch.float64}


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_holds_the_masters_bit_for_bit_and_is_the_same_whatever_the_model_computes_in(tmp_path, tied):
    start = save_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    learner, plain = make_learner(start, dtype="bfloat16"), make_learner(start)
    files = [one.save(tmp_path / str(index), 0, branch=0) for index, one in enumerate((learner, plain))]
    for name in ("model.safetensors", "config.json"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    assert json.loads((files[0] / "config.json").read_text())["dtype"] == "float32"
    train(learner, *make_batch())
    saved = load_file(learner.save(tmp_path / "0", 1, branch=0) / "model.safetensors")
    assert equal(saved, learner.weights())
    assert not equal(saved, plain.weights())
    assert ("lm_head.weight" in saved) is not tied


def test_a_restored_bfloat16_learner_resumes_bit_for_bit(path, tmp_path) -> None:
    config = {"dtype": "bfloat16", "updates_per_step": 2, "weight_decay": 0.1}
    straight, restored = (make_learner(path, **config) for _ in range(2))
    train(straight, *make_batch(step=1))
    restored.restore(straight.save(tmp_path, 1, branch=0))
    assert equal(straight.weights(), restored.weights())
    for learner in (straight, restored):
        train(learner, *make_batch(step=2))
    assert equal(straight.weights(), restored.weights())
    assert straight.digest() == restored.digest()


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_run_resumes_from_a_checkpoint_of_another_dtype(path, tmp_path, before, after) -> None:
    learner, other = make_learner(path, dtype=before), make_learner(path, dtype=after)
    train(learner, *make_batch(step=1))
    other.restore(learner.save(tmp_path, 1, branch=0))
    assert equal(learner.weights(), other.weights())
    start = {name: weight.clone() for name, weight in other.weights().items()}
    for each in (learner, other):
        train(each, *make_batch(step=2))
    moved = [
        torch.cat([(weight - start[name]).flatten() for name, weight in each.weights().items()])
        for each in (learner, other)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.95, "averages of the optimizer got lost"


def test_weights_of_another_model_change_nothing() -> None:
    masters = Masters(tiny_llama(), torch.bfloat16)
    before = {name: weight.clone() for name, weight in masters.named().items()}
    wider = tiny_llama(seed=1, intermediate_size=64).state_dict()
    with pytest.raises(RunError, match=r"6 weights are missing or of another shape .* model.layers.0.mlp.gate_proj"):
        masters.load_state_dict(wider)
    assert equal(masters.named(), before)


def test_what_is_published_and_compared_are_the_masters(path) -> None:
    learner = make_learner(path, dtype="bfloat16")
    weights, before = learner.weights(), learner.digest()
    assert {(weight.dtype, weight.requires_grad) for weight in weights.values()} == {(torch.float32, False)}
    assert "lm_head.weight" not in weights  # tied
    weights["model.norm.weight"][0] += 1e-6
    assert learner.digest() != before


def test_a_bfloat16_learner_makes_nearly_the_same_step_as_one_in_float32(path) -> None:
    learner, plain = (make_learner(path, dtype=dtype, loss=LossConfig(kl_coef=0.1)) for dtype in ("bfloat16", "auto"))
    assert (learner._model.dtype, learner._first_pass.reference.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (plain._model.dtype, plain._first_pass.reference.dtype) == (torch.float32, torch.float32)
    metrics, expected = (train(one, *make_batch(seed=3)) for one in (learner, plain))
    for name in ("learner/grad_norm", "learner/entropy", "learner/loss"):
        assert metrics[name] == pytest.approx(expected[name], rel=8 * BF16_ERROR, abs=1e-3), name


def test_a_bfloat16_learner_makes_rewarded_responses_likelier(path) -> None:
    learner = make_learner(path, dtype="bfloat16", lr=3e-3)
    prompt_ids, token_ids = torch.tensor([3, 1, 4]).int().numpy(), torch.arange(5, 13).int().numpy()
    pairs = [(prompt_ids, token_ids[:4]), (prompt_ids, token_ids[4:])]
    sums = []
    for step in range(1, 6):
        logprobs = learner.logprobs(step - 1, pairs)
        sums.append([part.sum() for part in logprobs])
        group = make_group(0, 3, [4, 4], [1.0, -1.0], version=step - 1)
        payload = Payload(prompt_ids, token_ids, torch.cat([torch.from_numpy(part) for part in logprobs]).numpy())
        train(learner, batch_of([group], step), payload)
    assert sums[-1][0] - sums[0][0] > 0.5
    assert sums[-1][1] - sums[0][1] < -0.5
