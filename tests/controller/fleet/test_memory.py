"""Memory and work of a run by formula; the formulas of the shape itself are held against real models in test_shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asyncdapo.config.config import Config, config_from_dict
from asyncdapo.controller.fleet.memory import (
    CHUNK_COLUMNS,
    CHUNK_ELEMENTS,
    GIB,
    engine_bytes,
    flop,
    learner_bytes,
    learner_forecast,
    learner_measured,
    step_flops,
)
from asyncdapo.learner.model import logprobs
from asyncdapo.model.shape import PUBLISHED, Shape, read_shape

SHAPE = Shape(
    num_layers=3,
    hidden_size=96,
    intermediate_size=320,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=500,
    tied_embeddings=False,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
)


def config_of(**sections: dict[str, object]) -> Config:
    """In float32 unless told; a learner computes in its engine's dtype."""
    rollout = {"dtype": "float32"} | sections.pop("rollout", {})
    learner = {"dtype": rollout["dtype"]} | sections.pop("learner", {})
    return config_from_dict({"model": {"path": "none"}, "rollout": rollout, "learner": learner, **sections})


def fixed(parts: dict[str, int]) -> int:
    """Bytes that no micro-batch adds to."""
    return sum(number for what, number in parts.items() if not what.startswith(("activations", "log-probs")))


def test_a_learner_in_float32_holds_four_numbers_a_parameter_and_a_fifth_with_a_reference_model() -> None:
    plain, with_reference = (
        learner_bytes(SHAPE, config_of(loss={"kl_coef": coef}), on_gpu=False) for coef in (0.0, 0.1)
    )
    assert fixed(plain) == 16 * SHAPE.num_parameters
    assert sum(with_reference.values()) - sum(plain.values()) == 4 * SHAPE.num_parameters


def test_a_learner_in_bfloat16_holds_rounded_weights_besides_and_leaves_half_as_much_of_a_token() -> None:
    config = config_of(learner={"dtype": "bfloat16"}, loss={"kl_coef": 0.1})
    parts, exact = learner_bytes(SHAPE, config, on_gpu=False), learner_bytes(SHAPE, config_of(), on_gpu=False)
    assert fixed(parts) == (16 + 2 + 2) * SHAPE.num_parameters
    assert parts["their bfloat16"] == 2 * SHAPE.num_parameters
    [rounded], [whole] = ([parts[key] for key in parts if key.startswith("activations")] for parts in (parts, exact))
    assert 0.5 < rounded / whole < 0.6  # norms keep float32


@pytest.mark.parametrize(("max_tokens", "has_room_for"), [(512, 2024), (4096, 4096)])
def test_a_micro_batch_has_room_for_the_longest_sequence(max_tokens: int, has_room_for: int) -> None:
    config = config_of(learner={"tokens_per_microbatch": max_tokens}, rollout={"max_response_length": 1000})
    assert f"activations of {has_room_for:,} tokens" in learner_bytes(SHAPE, config, on_gpu=True)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_at_long_answers_the_vocabulary_is_in_weights_and_their_gradients_only(name: str, checkpointing: str) -> None:
    """Of 20,480 tokens, whose logits of 152,064 words in float32 would take 11.6 GiB."""
    config = config_of(
        rollout={"max_response_length": 20480, "dtype": "bfloat16"}, learner={"activation_checkpointing": checkpointing}
    )
    large = read_shape(PUBLISHED[name])
    assert large is not None
    small = replace(large, vocab_size=32_000)
    there, here = (sum(learner_bytes(shape, config, on_gpu=True).values()) for shape in (large, small))
    num_more = large.num_parameters - small.num_parameters
    gradient = 2 * (large.vocab_size - small.vocab_size) * large.hidden_size  # in bfloat16, on its way
    assert there - here == (16 + 2) * num_more + gradient


def test_the_constants_are_those_of_the_log_probs() -> None:
    assert CHUNK_ELEMENTS == logprobs.CHUNK_ELEMENTS
    assert CHUNK_COLUMNS == logprobs.COLUMNS


def test_the_work_of_a_step_grows_with_completions_epochs_and_lengths() -> None:
    sizes = {"replay": {"prompts_per_step": 4}, "rollout": {"group_size": 8, "max_response_length": 300}}
    prompts = {"max_prompt_length": 100}
    of_one = SHAPE.train_flops(400, 300, 400 * 401 // 2)
    assert step_flops(SHAPE, config_of(**sizes, prompts=prompts)) == 32 * of_one
    assert step_flops(SHAPE, config_of(**sizes, prompts=prompts, learner={"epochs": 3})) == 96 * of_one


def test_what_is_said_before_the_start_is_the_sum_of_the_formulas() -> None:
    shape = read_shape(PUBLISHED["Qwen/Qwen2.5-1.5B"])
    assert shape is not None
    config = config_of(rollout={"dtype": "bfloat16"})
    memory, work = learner_forecast(shape, config, on_gpu=True)
    total = sum(learner_bytes(shape, config, on_gpu=True).values()) / GIB
    assert memory.startswith(f"learner: at most {total:.3g} GiB a rank by formula (weights 5.75, their bfloat16 2.88, ")
    assert work == f"learner: at most {flop(step_flops(shape, config_of()))} a step"


def test_a_step_is_held_against_the_forecast_with_what_is_known() -> None:
    measured = {"learner/peak_gib": 1.9, "learner/tflops": 430.0, "learner/mfu": 0.4348}
    assert learner_measured(2 * GIB, measured) == (
        "learner: 1.9 GiB at its peak so far, 2 by formula; 430 TFLOP a second, 43% of what the hardware has at most"
    )
    assert learner_measured(2 * GIB, {"learner/peak_gib": 1.9}) == "learner: 1.9 GiB at its peak so far, 2 by formula"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1.234e9, "1.23 GFLOP"),
        (999.4e9, "999 GFLOP"),
        (999.6e9, "1 TFLOP"),
        (3.2e19, "32 EFLOP"),
        (2e21, "2,000 EFLOP"),
    ],
)
def test_operations_are_written_without_exponents(number: float, text: str) -> None:
    assert flop(number) == text


def test_an_engine_holds_the_weights_twice_and_its_slots_in_its_own_number_format() -> None:
    rollout = {"slots": 8, "max_response_length": 76, "dtype": "bfloat16"}
    parts = engine_bytes(SHAPE, config_of(rollout=rollout, prompts={"max_prompt_length": 24}))
    cache = 2 * 3 * 8 * 100 * 2 * 16 * 2  # keys and values, layers, slots, tokens, heads, dims, bytes
    assert parts == {
        "weights": 2 * SHAPE.num_parameters,
        "KV cache of 8 x 100 tokens": cache,
        "new weights as they arrive": 2 * SHAPE.num_parameters,
    }
