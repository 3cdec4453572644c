"""Memory and work of a run by formula; the formulas of the shape itself are held against real models in test_shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

from asyncdapo.config.config import Config, config_from_dict
from asyncdapo.controller.fleet import memory
from asyncdapo.controller.fleet.memory import (
    CHECKPOINT_BYTES,
    CHUNK_COLUMNS,
    CHUNK_ELEMENTS,
    GATHERED_BYTES,
    GIB,
    engine_bytes,
    flop,
    host_bytes,
    learner_bytes,
    learner_forecast,
    learner_measured,
    state_bytes,
    step_flops,
)
from asyncdapo.learner.model import logprobs, sharding
from asyncdapo.model.files import ModelFiles
from asyncdapo.model.shape import PUBLISHED, Shape, read_shape
from tests.learner.tiny import make_batch, make_learner, save_tiny_llama, train

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


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_each_shard_holds_its_part_of_four_numbers_a_parameter_and_of_a_fifth_with_a_reference_model(
    num_shards: int,
) -> None:
    learner = {"ranks": 4, "shards": num_shards}
    plain, with_reference = (state_bytes(SHAPE, config_of(learner=learner, loss={"kl_coef": coef})) for coef in (0, 1))
    num_parameters = SHAPE.num_parameters / num_shards
    assert sum(plain.values()) == pytest.approx(16 * num_parameters, rel=1e-4)
    assert sum(with_reference.values()) == pytest.approx(20 * num_parameters, rel=1e-4)


def test_ranks_share_out_the_copy_of_a_checkpoint_replicas_as_well() -> None:
    for num_shards in (1, 4):
        config = config_of(learner={"ranks": 4, "shards": num_shards})
        assert host_bytes(SHAPE, config) == {"the copy of a checkpoint": 12 * SHAPE.num_parameters // 4}


def test_a_learner_in_bfloat16_gathers_half_as_much_and_leaves_half_as_much_of_a_token() -> None:
    config = config_of(learner={"dtype": "bfloat16"}, loss={"kl_coef": 0.1})
    parts, exact = learner_bytes(SHAPE, config, on_gpu=False), learner_bytes(SHAPE, config_of(), on_gpu=False)
    assert sum(state_bytes(SHAPE, config).values()) == (16 + 2) * SHAPE.num_parameters
    assert 2 * parts["gathered in bfloat16"] == exact["gathered in float32"]
    [rounded], [whole] = ([parts[key] for key in parts if key.startswith("activations")] for parts in (parts, exact))
    assert 0.5 < rounded / whole < 0.6  # norms keep float32


@pytest.mark.parametrize(
    ("num_layers", "learner", "num_blocks"),
    [(3, {}, 2), (1, {}, 1), (3, {"reshard_after_forward": False}, 3)],
    ids=["two blocks", "the only block", "all"],
)
def test_what_is_outside_the_blocks_is_gathered_and_two_blocks_or_all_of_them(
    num_layers: int, learner: dict[str, object], num_blocks: int
) -> None:
    shape = replace(SHAPE, num_layers=num_layers, intermediate_size=20_000)
    assert 4 * shape.num_block_parameters > GATHERED_BYTES
    parts = learner_bytes(shape, config_of(learner=learner), on_gpu=False)
    num_outside = 2 * 500 * 96 + 96  # embedding, output layer, last norm
    assert parts["gathered in float32"] == 4 * (num_outside + num_blocks * shape.num_block_parameters)


def test_small_blocks_are_gathered_all_at_once() -> None:
    assert 4 * SHAPE.num_block_parameters < GATHERED_BYTES
    assert learner_bytes(SHAPE, config_of(), on_gpu=False)["gathered in float32"] == 4 * SHAPE.num_parameters


def test_offload_leaves_a_gpu_what_a_step_computes_with_and_nothing_that_lasts() -> None:
    config, offloaded = (config_of(learner={"offload": offload}) for offload in ("none", "optimizer"))
    parts, left = (learner_bytes(SHAPE, one, on_gpu=True) for one in (config, offloaded))
    assert {what: number for what, number in parts.items() if what not in left} == state_bytes(SHAPE, offloaded)


def test_gradients_outside_the_blocks_count_as_far_as_they_exceed_the_activations_that_are_gone_then() -> None:
    wide = replace(SHAPE, vocab_size=1_000_000, intermediate_size=20_000)
    config = config_of(
        learner={"tokens_per_microbatch": 1},
        rollout={"max_response_length": 1},
        prompts={"max_prompt_length": 1},
        reward={"overlong_buffer": 0},
    )
    small = replace(wide, intermediate_size=320)  # its blocks' gradients come with them
    for shape, num_last in ((wide, wide.num_root_parameters), (small, small.num_parameters)):
        parts = learner_bytes(shape, config, on_gpu=False)
        [activations] = [number for what, number in parts.items() if what.startswith("activations")]
        assert parts["gradients on their way"] == 8 * num_last - activations


@pytest.mark.parametrize(("num_shards", "num_bytes"), [(1, 4 + 4), (2, 4 + 2)])
def test_gradients_of_a_block_are_copied_to_be_summed_and_where_nothing_is_to_be_summed_once_more(
    num_shards: int, num_bytes: int
) -> None:
    large = replace(SHAPE, intermediate_size=20_000)
    learner = {"dtype": "bfloat16", "ranks": 2, "shards": num_shards}
    parts = learner_bytes(large, config_of(learner=learner), on_gpu=False)
    assert parts["gradients on their way"] == num_bytes * large.num_block_parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gathered_bytes", [0, GATHERED_BYTES], ids=["group of each block", "one group"])
def test_what_one_shard_really_holds_at_its_peak_is_what_the_formula_says_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, gathered_bytes: int
) -> None:
    for module, columns in ((memory, "CHUNK_COLUMNS"), (logprobs, "COLUMNS")):  # their chunks would hide the weights
        monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 1 << 10)
        monkeypatch.setattr(module, columns, 64)
    for module in (memory, sharding):
        monkeypatch.setattr(module, "GATHERED_BYTES", gathered_bytes)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 1024, "num_hidden_layers": 4}
    path = save_tiny_llama(tmp_path, **sizes)
    learner = make_learner(path, dtype=dtype, tokens_per_microbatch=24)
    train(learner, *make_batch(1))
    shape = ModelFiles(path).shape
    assert shape is not None
    held = CHECKPOINT_BYTES * shape.num_parameters + peak_bytes(lambda: train(learner, *make_batch(2)))
    config = config_of(
        learner={"dtype": dtype, "tokens_per_microbatch": 24},
        rollout={"max_response_length": 16, "dtype": dtype},
        prompts={"max_prompt_length": 8},
        reward={"overlong_buffer": 0},
    )
    parts = learner_bytes(shape, config, on_gpu=False)
    assert held <= sum(parts.values()) - parts["two buckets"] < 1.25 * held


def peak_bytes(work: Callable[[], object]) -> int:
    """Of all that torch allocates on the CPU while `work` lasts, at most at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


PAPER_SIZES = {
    # 7,615,616,512 parameters, of which 1,089,998,336 are outside the 28 blocks of 233,057,792.
    "Qwen/Qwen2.5-7B": {
        "weights": 4 * 7_615_616_512 // 4,
        "gradients": 4 * 7_615_616_512 // 4,
        "AdamW": 8 * 7_615_616_512 // 4,
        "gathered in bfloat16": 2 * (1_089_998_336 + 2 * 233_057_792),
        "gradients on their way": (2 + 4) * 233_057_792,
        # A token leaves the inputs of 28 blocks, the last norm, rotations and its id; one block is computed again.
        "activations of 22,528 tokens": 22_528
        * (
            28 * 2 * 3584
            + ((6 * 3584 + 4) + 2 * 3584 + 2 * 2 * 128 + 8)
            + (2 * (8 * 3584 + 4) + 2 * 4 * 3584 + 4 * 28 + 2 * 4 * 18_944)
            + 2 * (2 * 18_944 + 2 * 3584)
        ),
        # A token's hidden state, five numbers and an id; the output layer's gradient and its sums; four chunks.
        "log-probs": 22_528 * (2 * 3584 + 20 + 8) + 2 * 152_064 * 3584 + 8 * 32_768 * 3584 + 16 * 33_554_432,
        "two buckets": 2 * 16 * 1_048_576,
    },
    # 14,770,033,664 parameters, of which 1,557,140,480 are outside the 48 blocks of 275,268,608.
    "Qwen/Qwen2.5-14B": {
        "weights": 4 * 14_770_033_664 // 4,
        "gradients": 4 * 14_770_033_664 // 4,
        "AdamW": 8 * 14_770_033_664 // 4,
        "gathered in bfloat16": 2 * (1_557_140_480 + 2 * 275_268_608),
        "gradients on their way": (2 + 4) * 275_268_608,
        "activations of 22,528 tokens": 22_528
        * (
            48 * 2 * 5120
            + ((6 * 5120 + 4) + 2 * 5120 + 2 * 2 * 128 + 8)
            + (2 * (8 * 5120 + 4) + 2 * 4 * 5120 + 4 * 40 + 2 * 4 * 13_824)
            + 2 * (2 * 13_824 + 2 * 5120)
        ),
        "log-probs": 22_528 * (2 * 5120 + 20 + 8) + 2 * 152_064 * 5120 + 8 * 32_768 * 5120 + 16 * 33_554_432,
        "two buckets": 2 * 16 * 1_048_576,
    },
    # 32,763,876,352 parameters, of which 1,557,140,480 are outside the 64 blocks of 487,605,248.
    "Qwen/Qwen2.5-32B": {
        "weights": 4 * 32_763_876_352 // 32,
        "gradients": 4 * 32_763_876_352 // 32,
        "AdamW": 8 * 32_763_876_352 // 32,
        "gathered in bfloat16": 2 * (1_557_140_480 + 2 * 487_605_248),
        "gradients on their way": (2 + 4) * 487_605_248,
        "activations of 22,528 tokens": 22_528
        * (
            64 * 2 * 5120
            + ((6 * 5120 + 4) + 2 * 5120 + 2 * 2 * 128 + 8)
            + (2 * (8 * 5120 + 4) + 2 * 4 * 5120 + 4 * 40 + 2 * 4 * 27_648)
            + 2 * (2 * 27_648 + 2 * 5120)
        ),
        "log-probs": 22_528 * (2 * 5120 + 20 + 8) + 2 * 152_064 * 5120 + 8 * 32_768 * 5120 + 16 * 33_554_432,
        "two buckets": 2 * 16 * 1_048_576,
    },
}


@pytest.mark.parametrize(
    ("name", "num_shards", "num_gib"),
    [("Qwen/Qwen2.5-7B", 4, 46.8), ("Qwen/Qwen2.5-14B", 4, 81.6), ("Qwen/Qwen2.5-32B", 32, 50.7)],
)
def test_ranks_of_the_published_sizes_take_what_is_computed_by_hand(name: str, num_shards: int, num_gib: float) -> None:
    shape = read_shape(PUBLISHED[name])
    assert shape is not None
    config = config_of(
        prompts={"max_prompt_length": 2048},
        rollout={"dtype": "bfloat16", "max_response_length": 20_480},
        learner={"activation_checkpointing": "full", "ranks": num_shards, "shards": num_shards},
    )
    parts = learner_bytes(shape, config, on_gpu=True)
    assert parts == PAPER_SIZES[name]
    assert sum(parts.values()) / GIB == pytest.approx(num_gib, abs=0.05)


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
    assert there - here == (16 + 2) * num_more + gradient  # states, and what is gathered in bfloat16


def test_the_constants_are_those_of_the_learner() -> None:
    assert GATHERED_BYTES == sharding.GATHERED_BYTES
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
    assert memory.startswith(f"learner: at most {total:.3g} GiB a rank by formula (weights 5.75, gradients 5.75, ")
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
