"""Fused ops give what the model's own parts give, forward and backward; parts of another formula aren't fused."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama import modeling_llama

from asyncdapo.learner.model import fused_ops
from asyncdapo.learner.model.fusing import ROTATION, FusedRotation, fuse

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
SIZES = dict(
    vocab_size=11, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, head_dim=8,
)  # fmt: skip


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**SIZES), attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def outputs(model):
    """Logits, and the gradient of every weight."""
    logits = model(torch.arange(10)[None] % 11).logits
    logits.square().sum().backward()
    return [logits, *(parameter.grad for parameter in model.parameters())]


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.fixture
def own_rotation(monkeypatch):
    """Llama's attention with the rotation that Hugging Face gives it; afterwards as it was."""
    current = modeling_llama.apply_rotary_pos_emb
    plain = current._plain if isinstance(current, FusedRotation) else current
    monkeypatch.setattr(modeling_llama, ROTATION, plain)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config, GemmaConfig])
def test_a_fused_model_has_the_logits_and_gradients_of_the_plain_one_in_float64(config):
    plain, fused = model_of(config).double(), model_of(config)
    fuse(fused)
    assert_close(outputs(fused), outputs(plain))


def test_the_parts_of_a_llama_are_fused(own_rotation):
    model = model_of(LlamaConfig)
    fuse(model)
    fused = [name for name, module in model.named_modules() if "forward" in vars(module)]
    in_block = ("mlp", "input_layernorm", "post_attention_layernorm")
    assert fused == [*(f"model.layers.{layer}.{name}" for layer in range(2) for name in in_block), "model.norm"]
    assert isinstance(modeling_llama.apply_rotary_pos_emb, FusedRotation)


def test_norms_and_activations_of_another_formula_stay_as_they_are():
    """Gemma adds 1 to the weight of a norm, and its MLP isn't gated by silu."""
    model = model_of(GemmaConfig)
    fuse(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_rotation_of_another_formula_stays_as_it_is(monkeypatch):
    def interleaved(q, k, cos, sin):
        return q * cos[:, None], k * cos[:, None]

    monkeypatch.setattr(modeling_llama, ROTATION, interleaved)
    fuse(model_of(LlamaConfig))
    assert modeling_llama.apply_rotary_pos_emb is interleaved


def test_without_a_compiler_nothing_is_fused(monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    fused_ops.library.cache_clear()
    model = model_of(LlamaConfig)
    fuse(model)
    fused_ops.library.cache_clear()
    assert not [module for module in model.modules() if "forward" in vars(module)]
    assert "no-such-compiler" in caplog.text


@settings(max_examples=20)
@given(rows=st.integers(1, 130), size=st.integers(1, 70), seed=st.integers(0, 9))
def test_norm_and_gate_of_any_size_are_those_of_float64(rows, size, seed):
    """To within a share of the largest number of all: over few numbers a norm's gradient is a difference of terms that
    are nearly equal."""
    torch.manual_seed(seed)
    x, up, weight, grad = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size), torch.randn(rows, size)
    leaves = [tensor.requires_grad_() for tensor in (x, up, weight)]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    found = [fused_ops.rms_norm(x, weight, 1e-5), fused_ops.swiglu(x * 9, up)]
    scale = (wide[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = [wide[0] * scale * wide[2], silu(wide[0] * 9) * wide[1]]
    sum((out * grad).sum() for out in found).backward()
    sum((out * grad).sum() for out in expected).backward()
    ours, theirs = ([*outs, *(leaf.grad for leaf in of)] for outs, of in ((found, leaves), (expected, wide)))
    assert_close([torch.cat([one.ravel() for one in ours])], [torch.cat([one.ravel() for one in theirs])])


def test_the_number_of_threads_does_not_change_a_bit():
    leaves = [torch.randn(300, 96, requires_grad=True), torch.randn(96, requires_grad=True)]
    before, results = torch.get_num_threads(), []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        out = fused_ops.rms_norm(*leaves, 1e-6)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
