"""However an update is computed, its gradient is that of plain Hugging Face passes in float64, a completion at a time.

Packed, with prompts shared, or alone; log-probs in chunks or not; blocks compiled or not; activations kept or computed
again.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.learner.attention.attention import NAME
from asyncdapo.learner.batches.samples import rows_by_update
from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.model import logprobs
from asyncdapo.learner.model.blocks import settle_blocks
from asyncdapo.learner.step.gradient import accumulate_gradient
from asyncdapo.learner.step.ranks import ALONE
from tests.learner.tiny import SHAPE, gradient_of, make_batch, needs_compiler, payloads_of, sharded, tiny_llama

TEMPERATURE = 0.8
ENTROPY_COEF = 0.01


def llama(**changes):
    return tiny_llama(**changes).double()


def qwen2(attn_implementation=NAME):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, attn_implementation=attn_implementation)).double().eval()


def qwen3(attn_implementation=NAME):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, attn_implementation=attn_implementation)).double().eval()


def update_rows():
    batch, payload = make_batch(seed=3, num_groups=5)
    rows = rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("grpo"))[0]
    num_tokens = sum(row.num_loss_tokens for row in rows)
    return [replace(row, weight=1 / num_tokens) for row in rows]


def plain_gradient(make_model):
    """The clipped loss and the entropy bonus, written down once more."""
    model, rows = make_model(attn_implementation="eager"), update_rows()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tokens_T = torch.tensor([*row.prompt_ids, *row.token_ids])
        logits_TV = model(tokens_T[None]).logits[0, len(row.prompt_ids) - 1 : -1] / TEMPERATURE
        policy = torch.distributions.Categorical(logits=logits_TV)
        logp_T = policy.log_prob(tokens_T[len(row.prompt_ids) :])
        ratio_T = (logp_T - torch.from_numpy(row.rollout_logprobs)).exp()
        objective_T = torch.minimum(ratio_T * row.advantage, ratio_T.clamp(0.8, 1.28) * row.advantage)
        total = total - row.weight * (objective_T + ENTROPY_COEF * policy.entropy()).sum()
    total.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def assert_equal_gradient(make_model, *, max_tokens, checkpointing, compile):
    model = make_model()
    settle_blocks(model, model.device, compile=compile, checkpointing=checkpointing)
    loss = LossConfig(entropy_coef=ENTROPY_COEF, dual_clip=None)  # as `plain_gradient` is
    policy = sharded(model, TEMPERATURE)
    accumulate_gradient(policy, update_rows(), loss, max_tokens=max_tokens, ranks=ALONE)
    expected = plain_gradient(make_model)
    assert expected.norm() > 0
    assert (gradient_of(policy) - expected).norm() <= 1e-6 * expected.norm()


@pytest.fixture(params=["whole", "chunks"])
def scores(request, monkeypatch):
    if request.param == "chunks":
        monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 40)
        monkeypatch.setattr(logprobs, "COLUMNS", 8)
        monkeypatch.setattr(logprobs, "ALIGNMENT", 1)


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("max_tokens", [10_000, 40, 1], ids=["one pass", "groups", "rows"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_packing_chunks_and_checkpoints_leave_the_gradient_as_it_is(max_tokens, checkpointing):
    assert_equal_gradient(llama, max_tokens=max_tokens, checkpointing=checkpointing, compile=False)


@pytest.mark.parametrize("make_model", [qwen2, qwen3])
def test_other_models_have_their_own_gradient_too(make_model):
    assert_equal_gradient(make_model, max_tokens=64, checkpointing="selective", compile=False)


@needs_compiler
@pytest.mark.soak
@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("max_tokens", [10_000, 40])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_have_the_same_gradient(max_tokens, checkpointing):
    assert_equal_gradient(llama, max_tokens=max_tokens, checkpointing=checkpointing, compile=True)
