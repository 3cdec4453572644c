"""Log-probs of given tokens against the plain Hugging Face forward, and which models are refused."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.errors import ConfigError
from asyncdapo.learner.attention.attention import NAME
from asyncdapo.learner.batches.samples import rows_by_update
from asyncdapo.learner.model.model import load_model
from asyncdapo.learner.model.packing import pack
from asyncdapo.learner.model.policy import Policy, check_policy
from tests.learner.tiny import SHAPE, make_batch, make_learner, payloads_of, save_tiny_llama, tiny_llama

CPU = torch.device("cpu")


def random_rows(seed):
    batch, payload = make_batch(seed=seed)
    return rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("grpo"))[0]


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, attn_implementation=NAME)).eval()


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, attn_implementation=NAME)).eval()


@pytest.mark.parametrize(
    ("make_model", "temperature"), [(tiny_llama, 1.0), (tiny_llama, 0.7), (qwen2, 0.7), (qwen3, 0.7)]
)
def test_logprobs_and_entropy_agree_with_the_hugging_face_forward_of_each_row_alone(make_model, temperature):
    torch.manual_seed(0)
    model = make_model().double()
    rows = random_rows(seed=2)
    packed = pack(rows, CPU)
    logp_BT, entropy_BT = Policy(model, temperature)(packed)
    for index, row in enumerate(rows):
        tokens_T = torch.tensor([*row.prompt_ids, *row.token_ids])
        logits_TV = model(tokens_T[None]).logits[0, :-1] / temperature
        policy = torch.distributions.Categorical(logits=logits_TV[len(row.prompt_ids) - 1 :])
        responses_T = tokens_T[len(row.prompt_ids) :]
        torch.testing.assert_close(logp_BT[index, row.response], policy.log_prob(responses_T))
        torch.testing.assert_close(entropy_BT[index, row.response], policy.entropy())
    assert not logp_BT[~packed.loss_mask_BT].any()
    assert not entropy_BT[~packed.loss_mask_BT].any()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_names_and_values_of_the_safetensors_file(tmp_path, tied):
    path = save_tiny_llama(tmp_path, tie_word_embeddings=tied)
    weights, saved = make_learner(path).weights(), load_file(f"{path}/model.safetensors")
    assert set(weights) == set(saved)
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    assert ("lm_head.weight" in weights) is not tied


def test_a_bfloat16_checkpoint_is_trained_in_float32(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {weight.dtype for weight in load_model(tmp_path, CPU).parameters()} == {torch.float32}


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    weights = {name: weight for name, weight in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ConfigError, match="lacks 2 weights .*q_proj"):
        load_model(tmp_path, CPU)


def test_a_model_that_scales_its_logits_after_the_output_layer_is_refused(tmp_path):
    GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="scales or caps its logits"):
        check_policy(Policy(load_model(tmp_path, CPU)))


def test_a_directory_without_a_readable_model_is_a_config_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_model(tmp_path, CPU)


def test_dropout_is_off(tmp_path):
    save_tiny_llama(tmp_path, attention_dropout=0.5)
    model = load_model(tmp_path, CPU)
    assert isinstance(model, LlamaForCausalLM)
    packed = pack(random_rows(seed=0), CPU)
    first, second = (Policy(model)(packed)[0] for _ in range(2))
    assert torch.equal(first, second)
