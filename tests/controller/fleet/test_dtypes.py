"""What engine and learner compute in, and when it is said what float32 costs."""

from __future__ import annotations

import logging

import pytest

from asyncdapo.config.config import Config, config_from_dict, to_yaml
from asyncdapo.controller.fleet.dtypes import dtype_lines, settle_dtypes
from asyncdapo.controller.fleet.fleet import settle
from asyncdapo.controller.fleet.placement import place

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
