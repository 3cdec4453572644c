"""What is said of the room on a GPU, at the edge of what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asyncdapo.config.config import Config, config_from_dict
from asyncdapo.controller.commands.fits import room_lines
from asyncdapo.controller.fleet.memory import (
    GIB,
    engine_bytes,
    gib,
    learner_bytes,
    sequences_in,
    with_reserve,
)
from asyncdapo.controller.fleet.placement import place
from asyncdapo.model.shape import PUBLISHED, Shape, read_shape

SHAPE = read_shape(PUBLISHED["Qwen/Qwen2.5-0.5B-Instruct"])


def config_of(**sections: dict[str, object]) -> Config:
    """In float32 unless told; a learner computes in its engine's dtype."""
    rollout = {"dtype": "float32"} | sections.pop("rollout", {})
    learner = {"dtype": rollout["dtype"]} | sections.pop("learner", {})
    return config_from_dict({"model": {"path": "none"}, "rollout": rollout, "learner": learner, **sections})


def paper_like(**learner: object) -> Config:
    """The learner of the 7B config: 18.5 GiB besides weights, gradients and AdamW, and the reserve."""
    return config_of(
        model={"path": "Qwen/Qwen2.5-7B"},
        prompts={"max_prompt_length": 2048},
        rollout={"engine": "vllm", "dtype": "bfloat16", "max_response_length": 20480},
        learner={"activation_checkpointing": "full"} | learner,
    )


def with_layers(num_bytes: int, config: Config) -> Shape:
    """The deepest shape of which a rank of the learner takes at most so many bytes, its reserve among them."""
    shape = deeper = SHAPE
    while with_reserve(sum(learner_bytes(deeper, config, on_gpu=True).values())) <= num_bytes:
        shape, deeper = deeper, replace(deeper, num_layers=deeper.num_layers + 1)
    return shape


def lines_of(config: Config, shape: Shape, num_gpus: int) -> list[str]:
    return room_lines(config, shape, place(config, [num_gpus]))


def test_one_layer_too_many_no_longer_fits() -> None:
    config = config_of(rollout={"slots": 1})
    shape = with_layers(79 * GIB, config)
    fits = lines_of(config, shape, 2)[0]
    assert fits.startswith("a GPU of 80 GB (79 GiB): a rank of the learner fits: it takes 7")
    assert fits.endswith("; an engine fits")
    small, large, smaller = lines_of(config, replace(shape, num_layers=shape.num_layers + 1), 2)
    assert "a rank of the learner doesn't fit: it has 79 and takes " in small
    assert "a rank of the learner fits" in large
    assert smaller == (
        "smaller: learner.activation_checkpointing=full, more learner.ranks, learner.offload=optimizer, "
        "a lower rollout.max_response_length"
    )


def test_beside_vllm_a_learner_has_what_that_and_new_weights_leave() -> None:
    config = config_of(rollout={"engine": "vllm", "memory_fraction": 0.5}, controller={"placement": "shared"})
    shape = with_layers(36 * GIB, config)
    arriving = engine_bytes(shape, config)["new weights as they arrive"]
    assert 2.5 * GIB < arriving < 3.5 * GIB
    assert "a rank of the learner fits" in lines_of(config, shape, 1)[0]
    more = config_of(rollout={"engine": "vllm", "memory_fraction": 0.56}, controller={"placement": "shared"})
    left = gib(0.44 * 79 * GIB - arriving)
    assert f"a rank of the learner doesn't fit: it has {left} and takes " in lines_of(more, shape, 1)[0]


def test_a_rank_whose_tensors_fit_and_whose_reserve_does_not_does_not_fit() -> None:
    config = paper_like(ranks=2, shards=2)
    shape = read_shape(PUBLISHED["Qwen/Qwen2.5-7B"])
    assert 74 < sum(learner_bytes(shape, config, on_gpu=True).values()) / GIB < 79
    assert "doesn't fit: it has 79 and takes 80.5, of which 5.26 are the reserve" in lines_of(config, shape, 3)[0]


def test_new_weights_are_counted_once_for_an_engine_of_several_processes_on_the_host() -> None:
    one, four = (
        engine_bytes(SHAPE, config_of(rollout={"engine": "vllm", "tensor_parallel": parts})) for parts in (1, 4)
    )
    assert four["new weights as they arrive, on the host"] == one["new weights as they arrive"]


def test_of_gpus_with_more_and_with_fewer_processes_the_fuller_one_counts() -> None:
    for num_workers, said in ((2, "an engine fits"), (4, "an engine doesn't fit")):  # four: two, one, and one on 3 GPUs
        config = config_of(rollout={"num_workers": num_workers, "slots": 1000})
        assert 79 / 2 < sum(engine_bytes(SHAPE, config).values()) / GIB < 79
        assert said in lines_of(config, SHAPE, 3)[0]


def test_the_room_for_sequences_is_what_weights_leave_over_all_gpus_of_an_engine() -> None:
    rollout = {"engine": "vllm", "dtype": "bfloat16", "max_response_length": 3072, "slots": 10}
    prompts = {"max_prompt_length": 1024}
    sequence = 4096 * SHAPE.kv_bytes("bfloat16")
    one, two = (config_of(rollout=rollout | {"tensor_parallel": parts}, prompts=prompts) for parts in (1, 2))
    weights = 2 * SHAPE.num_parameters
    assert sequences_in(SHAPE, one, weights + 3 * sequence) == 3
    assert sequences_in(SHAPE, one, weights + 3 * sequence - 1) == 2
    assert sequences_in(SHAPE, two, weights + 3 * sequence) == (weights + 6 * sequence) // sequence
    assert sequences_in(SHAPE, one, weights - 1) < 0


def test_an_engine_without_room_for_a_sequence_does_not_fit() -> None:
    shape = replace(SHAPE, num_layers=6000)
    [small, *_] = lines_of(config_of(rollout={"engine": "vllm"}), shape, 2)
    assert "an engine doesn't fit into its 71.1" in small


def test_the_embedded_engine_takes_what_the_formula_says() -> None:
    config = config_of(rollout={"slots": 4000, "max_response_length": 4096})
    needed = sum(engine_bytes(SHAPE, config).values())
    assert needed > 139 * GIB
    assert all("an engine doesn't fit" in line for line in lines_of(config, SHAPE, 2)[:2])


def test_on_the_cpu_nothing_is_said_of_gpus() -> None:
    assert lines_of(config_of(), SHAPE, 0) == []


@pytest.mark.parametrize(("num_gib", "text"), [(0.5, "0.5"), (79, "79"), (999, "999"), (1364.2, "1,364")])
def test_sizes_are_written_without_exponents(num_gib: float, text: str) -> None:
    assert gib(num_gib * GIB) == text


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
    ],
)
def test_the_published_shapes_have_as_many_parameters_as_the_models(name: str, num_parameters: int) -> None:
    shape = read_shape(PUBLISHED[name])
    assert shape is not None
    assert shape.num_parameters == num_parameters
