"""Weights between processes that share the one GPU of a test machine."""

from __future__ import annotations

import pytest
import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.process_group import device_name
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.sender import WeightSender
from tests.weights.members import Failed, fingerprint, form_group, members

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ONE_GPU = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
"""NCCL refuses two ranks on one GPU unless they seem to be on different hosts (NCCL_HOSTID)."""


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(1 << 20, device="cuda"), "steps": torch.arange(3, device="cuda")}


@pytest.fixture
def host_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (ONE_GPU | {"NCCL_HOSTID": "learner"}).items():
        monkeypatch.setenv(key, value)


@pytest.mark.usefixtures("host_of_its_own")
def test_nccl_brings_weights_from_gpu_to_gpu(weights: dict[str, torch.Tensor]):
    manifest = Manifest.of(weights, torch.bfloat16)
    with members(1) as [receiver]:
        receiver.start("set_environment", ONE_GPU | {"NCCL_HOSTID": "receiver"})
        assert receiver.result() is None
        group = form_group([receiver], 60.0, "nccl")
        receiver.start("receive", manifest, 1, 0, "cuda")
        WeightSender(group, manifest, 1 << 18).send(1, weights)
        wanted = {"weight": weights["weight"].to(torch.bfloat16), "steps": weights["steps"]}
        assert receiver.result() == fingerprint(wanted)
        group.close()


@pytest.mark.usefixtures("host_of_its_own")
def test_nccl_with_a_receiver_that_dies_fails_the_sender_and_leaves_its_process_alive(weights: dict[str, torch.Tensor]):
    manifest = Manifest.of(weights)
    with members(1) as [receiver]:
        receiver.start("set_environment", ONE_GPU | {"NCCL_HOSTID": "receiver"})
        assert receiver.result() is None
        group = form_group([receiver], 20.0, "nccl")
        sender = WeightSender(group, manifest, 1 << 18)
        receiver.start("receive", manifest, 1, 0, "cuda")
        sender.send(1, weights)
        assert not isinstance(receiver.result(), Failed)
        receiver.stop()
        with pytest.raises(WeightsError):
            sender.send(2, weights)
        assert group.closed


def test_gloo_stages_through_host_memory_to_and_from_a_gpu(weights: dict[str, torch.Tensor]):
    manifest = Manifest.of(weights)
    with members(1) as [receiver]:
        group = form_group([receiver])
        receiver.start("receive", manifest, 1, 0, "cuda")
        WeightSender(group, manifest, 1 << 18).send(1, weights)
        assert receiver.result() == fingerprint(weights)
        group.close()


def test_a_gpu_has_the_same_name_every_time():
    name = device_name(torch.device("cuda", 0))
    assert name.startswith("cuda ")
    assert device_name(torch.device("cuda", 0)) == name
