"""Packed attention is plain causal attention over each sequence alone, in every form that it is computed in."""

import math

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.errors import ConfigError
from asyncdapo.learner.attention import attention
from asyncdapo.learner.attention import attention_layout as layout
from asyncdapo.learner.attention.attention import NAME, gather_rows, packed_attention
from asyncdapo.learner.batches.samples import rows_by_update
from asyncdapo.learner.model.model import load_model
from asyncdapo.learner.model.packing import pack
from asyncdapo.learner.model.policy import Policy, check_policy
from tests.learner.tiny import SHAPE, make_batch, payloads_of, save_tiny_llama, tiny_llama

CPU = torch.device("cpu")


def rows_of(seed=0):
    batch, payload = make_batch(seed=seed)
    return rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("grpo"))[0]


def in_plain_torch(query_SND, key_SMD, value_SMD, ends_q, ends_k, max_q, max_k, *, scale, window_size):
    """What the variable-length kernel is documented to give: the last query of a segment stands with its last key."""
    assert (max_q, max_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    assert key_SMD.shape[1] == query_SND.shape[1]
    results = []
    for segment in range(len(ends_q) - 1):
        query_QND = query_SND[ends_q[segment] : ends_q[segment + 1]]
        key_KND, value_KND = (flat[ends_k[segment] : ends_k[segment + 1]] for flat in (key_SMD, value_SMD))
        scores_NQK = torch.einsum("qnd,knd->nqk", query_QND, key_KND) * (scale or 1 / math.sqrt(query_QND.shape[-1]))
        num_queries, num_keys = scores_NQK.shape[1:]
        ahead_QK = torch.arange(num_keys)[None] - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
        hidden_QK = (ahead_QK > 0) | ((ahead_QK < -window_size[0]) if window_size[0] >= 0 else False)
        weights_NQK = scores_NQK.masked_fill(hidden_QK, -math.inf).softmax(-1)
        results.append(torch.einsum("nqk,knd->qnd", weights_NQK, value_KND))
    return torch.cat(results)


@pytest.fixture
def by_segments(monkeypatch):
    """The way of a GPU, with the kernel's documented result in place of the kernel."""
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", in_plain_torch)
    monkeypatch.setattr(attention, "_has_kernel", lambda query, value: True)


def logprobs_and_gradient(model, rows):
    packed = pack(rows, CPU)
    logp_BT, _ = Policy(model)(packed)
    (logp_BT * torch.linspace(-1, 1, logp_BT.numel()).view(logp_BT.shape)).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return logp_BT.detach(), gradient


@pytest.mark.parametrize("window", [None, 3])
def test_segments_give_what_rectangles_give(request, window):
    make = tiny_llama if window is None else lambda: mistral(window)
    expected = logprobs_and_gradient(make().double(), rows_of())
    request.getfixturevalue("by_segments")
    for got, reference in zip(logprobs_and_gradient(make().double(), rows_of()), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-6)


def mistral(window):
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, sliding_window=window, attn_implementation=NAME)
    return MistralForCausalLM(config).eval()


def test_a_sliding_window_hides_what_is_too_far_back():
    near, far, other = mistral(3).double(), mistral(50).double(), mistral(3)
    assert not torch.allclose(logprobs_and_gradient(near, rows_of())[0], logprobs_and_gradient(far, rows_of())[0])
    other.set_attn_implementation("eager")
    other = other.double()
    row = max(rows_of(), key=lambda row: row.num_tokens)
    tokens_T = torch.tensor([*row.prompt_ids, *row.token_ids])
    alone_TV = other(tokens_T[None], use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
    packed_T = Policy(near)(pack([row], CPU))[0][0]
    torch.testing.assert_close(packed_T, alone_TV.gather(-1, tokens_T[len(row.prompt_ids) :, None])[:, 0])


@pytest.mark.parametrize("pairs", [0, 100, 10**9])
def test_how_sequences_stand_in_rectangles_changes_nothing(monkeypatch, pairs):
    expected = logprobs_and_gradient(tiny_llama().double(), rows_of(seed=1))
    monkeypatch.setattr(layout, "RECTANGLE_PAIRS", pairs)
    for got, reference in zip(logprobs_and_gradient(tiny_llama().double(), rows_of(seed=1)), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-12)


def test_gathered_rows_get_the_sum_of_their_gradients_in_float32():
    values = torch.zeros(3, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([1] * 1000 + [2])
    gathered = gather_rows(values, rows)
    gathered.backward(torch.full_like(gathered, 0.01))
    one = torch.tensor(0.01, dtype=torch.bfloat16).float()
    assert values.grad[0].abs().max() == 0
    assert torch.equal(values.grad[1], (1000 * one).bfloat16().expand(2, 4))
    assert torch.equal(values.grad[2], one.bfloat16().expand(2, 4))


def test_a_model_whose_attention_is_more_than_causal_is_refused(tmp_path):
    Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=None)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="asks its attention for softcap"):
        check_policy(Policy(load_model(tmp_path, CPU)))


MOE = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (PhimoeConfig(**SHAPE, num_local_experts=2, sliding_window=64), 64),
        (Qwen2MoeConfig(**SHAPE, **MOE, **WINDOWS), 4096),
        (Llama4TextConfig(**SHAPE, num_local_experts=2, attention_chunk_size=8192, intermediate_size_mlp=48), 8192),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_window_that_is_in_the_mask_alone_is_refused_however_long_it_is(tmp_path, config, window):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    told = f"its mask has a window of {window} tokens, its attention is told None"
    with pytest.raises(ConfigError, match=f"can't be trained packed, which is without masks: {told}"):
        check_policy(Policy(load_model(tmp_path, CPU)))


def test_a_window_that_attention_has_and_the_mask_has_not_is_refused(tmp_path):
    model = load_model(save_tiny_llama(tmp_path), CPU)
    own = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: own(*args, sliding_window=4096, **kwargs)
    with pytest.raises(ConfigError, match="its mask has a window of None tokens, its attention is told 4096"):
        check_policy(Policy(model))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma3_text", "cohere2", "starcoder2"])
def test_a_window_that_attention_is_told_of_is_accepted(tmp_path, kind):
    config = AutoConfig.for_model(kind, **SHAPE, **WINDOWS, head_dim=8, logit_scale=1.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, CPU)
    check_policy(Policy(model))
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("config", [GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4), MptConfig(d_model=32)])
def test_a_model_whose_attention_cannot_be_replaced_is_refused(tmp_path, config):
    config.vocab_size, config.n_layers = SHAPE["vocab_size"], 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="can't be trained packed"):
        check_policy(Policy(load_model(tmp_path, CPU)))


def test_a_model_that_passes_over_the_layout_is_refused(tmp_path):
    model = load_model(save_tiny_llama(tmp_path), CPU)
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, layout=None, **kwargs: own(*args, **kwargs)
    with pytest.raises(ConfigError, match="can't be trained packed: outputs differ"):
        check_policy(Policy(model))


def test_a_mask_is_refused_and_not_passed_over():
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ConfigError, match="attention mask of its own"):
        packed_attention(None, query, query, query, torch.zeros(1, 1, 3, 3))


def test_a_saved_model_does_not_ask_for_our_attention(tmp_path):
    load_model(save_tiny_llama(tmp_path / "in"), CPU).save_pretrained(tmp_path / "out")
    assert NAME not in (tmp_path / "out" / "config.json").read_text()
