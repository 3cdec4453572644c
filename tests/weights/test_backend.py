from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

from asyncdapo.errors import ConfigError
from asyncdapo.transport.backend import fitting_backend, host_of, is_cpu
from asyncdapo.transport.shared_memory import device_name
from asyncdapo.weights.backend import choose_backend
from asyncdapo.weights.config import WeightsConfig

OWN_GPUS = {"learner": "cuda A on x", "rollout 0": "cuda B on x", "rollout 1": "cuda C on y"}


def test_auto_takes_nccl_when_every_end_has_a_gpu_of_its_own():
    backend, reason = choose_backend(WeightsConfig(), OWN_GPUS)
    assert backend == "nccl"
    assert "GPU of its own" in reason


def test_auto_shares_memory_on_each_machine_and_names_the_end_without_a_gpu():
    backend, reason = choose_backend(WeightsConfig(), OWN_GPUS | {"rollout 1": "cpu on y"})
    assert backend == "ipc"
    assert reason == "shared memory on each of 2 machines, Gloo between them: rollout 1 has no GPU"


def test_auto_shares_memory_on_each_machine_and_names_the_ends_that_share_a_gpu():
    backend, reason = choose_backend(WeightsConfig(), OWN_GPUS | {"rollout 2": "cuda A on x"})
    assert backend == "ipc"
    assert "learner and rollout 2 share" in reason


def test_auto_takes_shared_memory_when_all_ends_are_on_one_gpu():
    backend, reason = choose_backend(WeightsConfig(), {"learner": "cuda A on x", "rollout 0": "cuda A on x"})
    assert backend == "ipc"
    assert "one GPU" in reason


@pytest.mark.parametrize("device", ["cpu on x", "cuda A on x"])
def test_auto_takes_shared_memory_on_one_machine_where_nccl_can_not_be(device: str):
    ends = {"learner": "cuda A on x", "rollout 0": device, "rollout 1": "cuda B on x"}
    backend, reason = choose_backend(WeightsConfig(), ends)
    assert backend == "ipc"
    assert "one machine, and" in reason


def test_auto_with_no_worker_has_nothing_to_share():
    assert choose_backend(WeightsConfig(), {"learner": "cuda A on x"})[0] == "nccl"


def test_the_learners_ranks_never_sum_through_shared_memory():
    backend, reason = fitting_backend({"learner": "cuda A on x", "learner-1": "cuda A on x"})
    assert backend == "gloo"
    assert "learner and learner-1 share" in reason


def test_what_the_user_names_is_taken():
    without_gpu = {"learner": "cpu on x", "rollout 0": "cpu on x"}
    assert choose_backend(WeightsConfig(backend="gloo"), OWN_GPUS)[0] == "gloo"
    assert choose_backend(WeightsConfig(backend="nccl"), OWN_GPUS)[0] == "nccl"
    assert choose_backend(WeightsConfig(backend="ipc"), OWN_GPUS)[0] == "ipc"
    assert choose_backend(WeightsConfig(backend="ipc"), without_gpu)[0] == "ipc"


def test_nccl_without_a_gpu_is_a_configuration_error_that_names_the_end():
    with pytest.raises(ConfigError, match="weights.backend: needs a GPU of its own at every end: rollout 0 has no GPU"):
        choose_backend(WeightsConfig(backend="nccl"), {"learner": "cuda A on x", "rollout 0": "cpu on x"})


def test_nccl_on_a_shared_gpu_is_a_configuration_error_that_names_who_shares_it():
    with pytest.raises(
        ConfigError, match="weights.backend: needs a GPU of its own at every end: learner and rollout 0 share"
    ):
        choose_backend(WeightsConfig(backend="nccl"), {"learner": "cuda A on x", "rollout 0": "cuda A on x"})


def test_a_cpu_is_named_after_its_machine():
    name = device_name(torch.device("cpu"))
    assert is_cpu(name)
    assert host_of(name).startswith(socket.gethostname())


def test_processes_with_host_ids_of_their_own_are_on_hosts_of_their_own(monkeypatch):
    here = device_name(torch.device("cpu"))
    monkeypatch.setenv("NCCL_HOSTID", "b")
    assert host_of(device_name(torch.device("cpu"))) != host_of(here)


def test_the_controller_can_plan_and_choose_without_torch():
    code = "import sys, asyncdapo.weights.backend, asyncdapo.weights.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
