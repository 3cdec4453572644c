"""Rotations whose angles depend on the longest sequence of a batch: where they do, the model is refused."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from asyncdapo.errors import ConfigError
from asyncdapo.learner.attention.attention import NAME
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.model.rotation import check_rotation
from asyncdapo.learner.step.probe import response_logprobs
from tests.learner.tiny import SHAPE, VOCAB_SIZE

ORIGINAL = 12
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(
        Phi3Config(
            **SHAPE,
            pad_token_id=0,
            rope_parameters=dict(LONGROPE),
            original_max_position_embeddings=ORIGINAL,
            attn_implementation=NAME,
        )
    )


def llama() -> PreTrainedModel:
    sizes = {**SHAPE, "max_position_embeddings": ORIGINAL}
    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=dict(DYNAMIC), attn_implementation=NAME))


def change_beside(make, num_positions: int) -> float:
    """Of the log-probs of a short sequence, when one of this length is packed with it; nats, the largest."""
    torch.manual_seed(0)
    model, rng = make().eval().double(), np.random.default_rng(0)
    short, long = (
        (rng.integers(VOCAB_SIZE, size=4), rng.integers(VOCAB_SIZE, size=total - 4), None)
        for total in (ORIGINAL, num_positions)
    )
    alone, beside = (response_logprobs(Policy(model), pairs, 4096)[0] for pairs in ([short], [short, long]))
    return float(np.abs(alone - beside).max())


def refusal_of(model: PreTrainedModel, num_positions: int) -> str:
    try:
        check_rotation(model.config.to_dict(), num_positions, "org/model")
    except ConfigError as error:
        return str(error)
    return ""


def test_longrope_is_accepted_exactly_as_far_as_neighbours_in_a_batch_change_nothing():
    assert change_beside(phi3, ORIGINAL) < 1e-6
    assert refusal_of(phi3(), ORIGINAL) == ""
    assert change_beside(phi3, ORIGINAL + 2) > 0.01
    assert refusal_of(phi3(), ORIGINAL + 1) == (
        "model.path: can't be trained: its rope_type is longrope, whose angles depend on the longest sequence of a "
        "batch, got 'org/model' (up to original_max_position_embeddings, 12, they don't: lower "
        "prompts.max_prompt_length or rollout.max_response_length, 13 together)"
    )


def test_dynamic_angles_are_refused():
    assert change_beside(llama, ORIGINAL + 20) > 0.01
    assert "its rope_type is dynamic" in refusal_of(llama(), 1)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096},
        {"rope_scaling": {"type": "yarn"}, "model_type": "phi3", "original_max_position_embeddings": 4096},
        {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 4096}},
        {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": None}}},
        {"rope_parameters": LONGROPE},
    ],
)
def test_every_way_to_write_it_is_read(config):
    with pytest.raises(ConfigError, match="longest sequence of a batch"):
        check_rotation(config, 4097, "org/model")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "model_type": "qwen2"},
        {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8}},
    ],
)
def test_angles_of_a_token_s_own_position_are_accepted(config):
    check_rotation(config, 4097, "org/model")
