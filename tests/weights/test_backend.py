from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from asyncdapo.errors import ConfigError
from asyncdapo.transport.process_group import device_name
from asyncdapo.weights.backend import choose_backend
from asyncdapo.weights.config import WeightsConfig

OWN_GPUS = {"learner": "cuda A", "rollout 0": "cuda B", "rollout 1": "cuda C"}


def test_auto_takes_nccl_when_every_end_has_a_gpu_of_its_own():
    backend, reason = choose_backend(WeightsConfig(), OWN_GPUS)
    assert backend == "nccl"
    assert "GPU of its own" in reason


def test_auto_takes_gloo_and_names_the_end_without_a_gpu():
    backend, reason = choose_backend(WeightsConfig(), OWN_GPUS | {"rollout 1": "cpu"})
    assert backend == "gloo"
    assert "rollout 1 has no GPU" in reason


def test_auto_takes_gloo_and_names_the_ends_that_share_a_gpu():
    backend, reason = choose_backend(WeightsConfig(), OWN_GPUS | {"rollout 1": "cuda A"})
    assert backend == "gloo"
    assert "learner and rollout 1 share" in reason


def test_what_the_user_names_is_taken():
    shared = {"learner": "cuda A", "rollout 0": "cuda A"}
    assert choose_backend(WeightsConfig(backend="gloo"), OWN_GPUS)[0] == "gloo"
    assert choose_backend(WeightsConfig(backend="nccl"), shared)[0] == "nccl"


def test_nccl_without_a_gpu_is_a_configuration_error_that_names_the_end():
    with pytest.raises(ConfigError, match="weights.backend: needs a GPU at every end, rollout 0 has none"):
        choose_backend(WeightsConfig(backend="nccl"), {"learner": "cuda A", "rollout 0": "cpu"})


def test_a_cpu_is_named_cpu():
    assert device_name(torch.device("cpu")) == "cpu"


def test_the_controller_can_plan_and_choose_without_torch():
    code = "import sys, asyncdapo.weights.backend, asyncdapo.weights.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
