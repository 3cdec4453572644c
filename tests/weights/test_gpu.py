"""Weights between processes that share the one GPU of a test machine."""

from __future__ import annotations

import pytest
import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.shared_memory import device_name
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receive_buffer import ReceiveBuffer
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
        group = form_group([receiver], 60.0, "nccl", "cuda")
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
        group = form_group([receiver], 20.0, "nccl", "cuda")
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


@pytest.mark.parametrize("num_receivers", [1, 2])
def test_processes_on_one_gpu_share_its_memory(weights: dict[str, torch.Tensor], num_receivers: int):
    manifest = Manifest.of(weights, torch.bfloat16)
    with members(num_receivers) as receivers:
        group = form_group(receivers, 60.0, "ipc", "cuda")
        assert group.carrier.device.type == "cuda"
        sender = WeightSender(group, manifest, 1 << 18)
        for version in (1, 2, 3):
            for receiver in receivers:
                receiver.start("receive", manifest, version, 0, "cuda")
            sender.send(version, weights)
            wanted = {"weight": weights["weight"].to(torch.bfloat16), "steps": weights["steps"]}
            assert [receiver.result() for receiver in receivers] == [fingerprint(wanted)] * num_receivers
            weights["weight"] += 1
        group.close()


def test_a_receiver_on_the_gpu_that_is_killed_fails_the_sender_and_a_new_group_works(weights: dict[str, torch.Tensor]):
    manifest = Manifest.of(weights)
    with members(2) as [victim, survivor]:
        group = form_group([victim, survivor], 20.0, "ipc", "cuda")
        survivor.start("receive", manifest, 1, 0, "cuda")
        victim.stop()
        with pytest.raises(WeightsError):
            WeightSender(group, manifest, 1 << 18).send(1, weights)
        assert isinstance(survivor.result(), Failed)
        group = form_group([survivor], 60.0, "ipc", "cuda")
        survivor.start("receive", manifest, 2, 0, "cuda")
        WeightSender(group, manifest, 1 << 18).send(2, weights)
        assert survivor.result() == fingerprint(weights)
        group.close()


def test_a_learner_on_the_gpu_and_a_worker_without_one_share_memory_of_the_host(weights: dict[str, torch.Tensor]):
    manifest = Manifest.of(weights)
    with members(1) as [receiver]:
        group = WeightGroup.create_master("127.0.0.1", 2, "ipc", 60.0, torch.device("cuda"))
        receiver.start("join", group.address, 1, 2, "ipc", 60.0, torch.device("cpu"))
        group.connect()
        assert receiver.result() is None
        receiver.start("receive", manifest, 1)
        WeightSender(group, manifest, 1 << 18).send(1, weights)
        assert receiver.result() == fingerprint(weights)
        group.close()


def test_a_gpu_with_room_stages_the_stream_itself(weights: dict[str, torch.Tensor]):
    manifest = Manifest.of(weights)
    group = WeightGroup.create_master("127.0.0.1", 2, "gloo", 60.0, torch.device("cuda"))
    buffer = ReceiveBuffer(torch.device("cuda"))
    joining = buffer.join(group.address, 1, 2, "gloo", manifest, 60.0)
    group.connect()
    joining.result()
    receiving = buffer.receive(1, 0)
    WeightSender(group, manifest, 1 << 18).send(1, weights)
    receiving.result()
    assert all(tensor.is_cuda for tensor in buffer.take(1).values())
    assert fingerprint(buffer.take(1)) == fingerprint(weights)
    assert "memory of the GPU" in buffer.memory
    buffer.close()
    group.close()


def test_a_gpu_has_the_same_name_every_time():
    name = device_name(torch.device("cuda", 0))
    assert name.startswith("cuda ")
    assert device_name(torch.device("cuda", 0)) == name
