"""What `auto` stands for: what engine and learner compute in, and how many ranks divide the weights."""

from __future__ import annotations

import logging

import pytest

from asyncdapo.config.config import Config, config_from_dict, to_yaml
from asyncdapo.controller.fleet.auto import check_host, dtype_lines, settle_dtypes, settle_placement, shards_line
from asyncdapo.controller.fleet.fleet import settle
from asyncdapo.controller.fleet.placement import place
from asyncdapo.errors import ConfigError

AUTO = "auto"


def config_of(
    rollout: str = AUTO,
    learner: str = AUTO,
    *,
    devices: tuple[str, str] = (AUTO, AUTO),
) -> Config:
    return config_from_dict(
        {
            "model": {"path": "none"},
            "rollout": {"dtype": rollout, "device": devices[0]},
            "learner": {"dtype": learner, "device": devices[1]},
        }
    )


@pytest.mark.parametrize(
    ("asked", "devices", "num_gpus", "expected"),
    [
        ((AUTO, AUTO), (AUTO, AUTO), 2, ("bfloat16", "bfloat16")),
        ((AUTO, AUTO), (AUTO, AUTO), 1, ("bfloat16", "bfloat16")),
        ((AUTO, AUTO), (AUTO, AUTO), 0, ("float32", "float32")),
        ((AUTO, AUTO), ("cpu", AUTO), 1, ("float32", "float32")),
        ((AUTO, AUTO), (AUTO, "cpu"), 1, ("bfloat16", "float32")),
        (("float32", AUTO), (AUTO, AUTO), 2, ("float32", "float32")),
        (("bfloat16", AUTO), (AUTO, AUTO), 0, ("bfloat16", "float32")),
        ((AUTO, "float32"), (AUTO, AUTO), 2, ("bfloat16", "float32")),
        (("float32", "bfloat16"), (AUTO, AUTO), 2, ("float32", "bfloat16")),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_and_a_learner_there_follows_its_engine(asked, devices, num_gpus, expected) -> None:
    config = config_of(*asked, devices=devices)
    settled = settle_dtypes(config, place(config, [num_gpus]))
    assert (settled.rollout.dtype, settled.learner.dtype) == expected
    assert settled.rollout.parity_stop == {"float32": 0.05, "bfloat16": 0.5}[expected[0]]


def test_float32_on_a_gpu_is_allowed_and_its_cost_is_said() -> None:
    config = config_of(rollout="float32")
    said, *costs = dtype_lines(config, place(config, [2]))
    assert said == "rollout.dtype float32, learner.dtype float32 (auto, on a GPU)"
    assert len(costs) == 2
    assert costs[0].startswith("rollout.dtype float32 on a GPU: ")
    assert costs[1].startswith("learner.dtype float32 on a GPU: no flash attention")
    assert all(cost.endswith("; rollout.dtype=bfloat16 avoids it") for cost in costs)
    assert len(dtype_lines(config, place(config, [0]))) == 1


def test_a_learner_in_float32_beside_engines_in_bfloat16_is_told_its_own_key() -> None:
    for config in (config_of(learner="float32"), config_of(devices=("cpu", AUTO))):
        [cost] = dtype_lines(config, place(config, [2]))[1:]
        assert cost.endswith("; learner.dtype=bfloat16 avoids it")


def test_all_processes_of_a_run_on_gpus_get_bfloat16_and_the_start_says_so(caplog) -> None:
    caplog.set_level(logging.INFO, logger="controller")
    config, _ = settle(config_of(), [2], ["learner"])
    assert (config.rollout.dtype, config.learner.dtype) == ("bfloat16", "bfloat16")
    assert "rollout.dtype bfloat16 (auto, on a GPU), learner.dtype bfloat16 (auto, on a GPU)" in caplog.text


def test_an_evaluation_says_nothing_of_a_learner(caplog) -> None:
    caplog.set_level(logging.INFO, logger="controller")
    settle(config_of(rollout="float32"), [1], ranks=())
    assert "rollout.dtype float32 on a GPU" in caplog.text
    assert "learner" not in caplog.text


def test_a_run_directory_records_auto_so_that_the_run_may_resume_elsewhere() -> None:
    assert "  dtype: auto\n" in to_yaml(config_of())


# -------------------------------------------------------------------------------------------------------------- shards


def paper_like(**learner: object) -> Config:
    """The learner of the 7B config: 18.5 GiB besides weights, gradients and AdamW, and the reserve."""
    return config_from_dict(
        {
            "model": {"path": "Qwen/Qwen2.5-7B"},
            "prompts": {"max_prompt_length": 2048},
            "rollout": {"engine": "vllm", "max_response_length": 20480},
            "learner": {"activation_checkpointing": "full", **learner},
        }
    )


@pytest.mark.parametrize(("num_ranks", "num_shards"), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 3), (9, 3), (16, 4)])
def test_auto_is_the_smallest_number_of_shards_that_fits_80_gb_and_divides_the_ranks(
    num_ranks: int, num_shards: int
) -> None:
    """113.5 GiB of states: 2 shards take 56.7 + 18.5 and a reserve of 5.3, 3 take 37.8. 1 or 2 ranks don't fit."""
    config, placement = settle_placement(paper_like(ranks=num_ranks), [num_ranks + 1])
    assert config.learner.shards == num_shards
    assert placement.on_gpus("learner")


def test_auto_is_one_on_a_cpu_and_all_ranks_for_a_kind_of_model_without_a_formula() -> None:
    assert settle_placement(paper_like(ranks=4), [0])[0].learner.shards == 1
    unknown = config_from_dict({"model": {"path": "none"}, "learner": {"ranks": 4}})
    assert settle_placement(unknown, [8])[0].learner.shards == 4
    assert settle_placement(paper_like(ranks=4, shards=1), [8])[0].learner.shards == 1  # what is given stays


@pytest.mark.parametrize(
    ("learner", "nodes", "line"),
    [
        ({"ranks": 4, "shards": 4}, [8], "one copy of the weights, divided among 4 ranks, 4 of them on one node"),
        ({"ranks": 8, "shards": 4}, [9], "2 copies of the weights, divided among 4 ranks each, 4 of them on one node"),
        ({"ranks": 4, "shards": 4}, [2, 3], "one copy of the weights, divided among 4 ranks, 2 of them on one node"),
        ({"ranks": 3, "shards": 3}, [2, 2], "one copy of the weights, divided among 3 ranks"),
        ({"ranks": 2, "shards": 1}, [3], "2 copies of the weights, each a whole one"),
    ],
)
def test_it_is_said_how_the_ranks_divide_the_weights(learner: dict[str, object], nodes: list[int], line: str) -> None:
    assert shards_line(*settle_placement(paper_like(**learner), nodes)) == f"{learner['ranks']} ranks have {line}"


def test_offload_without_room_on_the_host_is_refused_with_the_numbers() -> None:
    config, placement = settle_placement(paper_like(ranks=4, shards=4, offload="optimizer"), [8])
    needed = (16 + 12) * 7_615_616_512  # bytes a parameter, over all four ranks, and of a checkpoint
    check_host(config, placement, needed)
    with pytest.raises(ConfigError) as caught:
        check_host(config, placement, needed - 1)
    assert str(caught.value) == (
        "learner.offload: takes 199 GiB of this host's memory (4 x 49.6, with the copy of a checkpoint), which has "
        "199, got 'optimizer' (use none, or more learner.shards)"
    )
    check_host(*settle_placement(paper_like(ranks=4, shards=4), [8]), 0)
