"""Weights to workers on several hosts. Hosts are planted: the processes are on this machine."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from asyncdapo.errors import WeightsError
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receive_buffer import ReceiveBuffer
from asyncdapo.weights.sender import WeightSender
from tests.ports import listening, strangers
from tests.weights.members import Failed, Member, fingerprint, form_group, members

BUCKET_BYTES = 4096
TIMEOUT_S = 20.0
LEARNERS = ""
"""The host of the learner."""
LEADER, READER, LAST = range(3)
"""Workers of two hosts: one that leads the first, one that reads its memory, one that leads the second."""

TENSORS = {"embed": torch.randn(1000, 17), "odd": torch.arange(7, dtype=torch.int8), "weight": torch.randn(20_000)}
MANIFEST = Manifest.of(TENSORS)


def send(receivers: list[Member], sender: WeightSender, version: int) -> list[object]:
    """What each receiver then has."""
    for receiver in receivers:
        receiver.start("receive", MANIFEST, version)
    sender.send(version, TENSORS)
    return [receiver.result() for receiver in receivers]


@pytest.mark.parametrize("hosts", [["b"], ["b", "c", "b", "c", LEARNERS]], ids="-".join)
def test_workers_on_any_hosts_get_every_version_bit_by_bit(hosts: list[str]) -> None:
    with members(len(hosts)) as receivers:
        group = form_group(receivers, backend="ipc", hosts=hosts)
        sender = WeightSender(group, MANIFEST, BUCKET_BYTES)
        for version in (1, 2, 3):
            assert send(receivers, sender, version) == [fingerprint(TENSORS)] * len(hosts)
        group.close()


def test_weights_leave_the_learners_host_once_whatever_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[int, int] = {}
    with members(4) as receivers:
        group = form_group(receivers, backend="ipc", hosts=["b", LEARNERS, "c", "b"])
        send_to = group.send

        def count(tensor: torch.Tensor, rank: int, *args: object) -> object:
            sent[rank] = sent.get(rank, 0) + tensor.nbytes
            return send_to(tensor, rank, *args)

        monkeypatch.setattr(group, "send", count)
        send(receivers, WeightSender(group, MANIFEST, BUCKET_BYTES), 1)
        group.close()
    assert sent.keys() == {1, 2}
    assert sent[1] == MANIFEST.offsets[-1]


@pytest.mark.parametrize("victim", [LEADER, *(pytest.param(one, marks=pytest.mark.soak) for one in (READER, LAST))])
def test_a_worker_killed_in_a_transfer_between_hosts_fails_it_at_once_for_all(victim: int) -> None:
    with members(3) as receivers:
        survivors = [receiver for receiver in receivers if receiver is not receivers[victim]]
        group = form_group(receivers, TIMEOUT_S, "ipc", hosts=["b", "b", "c"])
        for receiver in survivors:
            receiver.start("receive", MANIFEST, 1)
        receivers[victim].start("die_in_transfer", MANIFEST, 1, 64)
        began_s = time.monotonic()
        with pytest.raises(WeightsError):
            WeightSender(group, MANIFEST, 64).send(1, TENSORS)
        assert all(isinstance(receiver.result(), Failed) for receiver in survivors)
        assert time.monotonic() - began_s < TIMEOUT_S

        group = form_group(survivors, backend="ipc")
        assert send(survivors, WeightSender(group, MANIFEST, BUCKET_BYTES), 2) == [fingerprint(TENSORS)] * 2
        group.close()


def test_strangers_at_every_port_of_a_group_change_nothing_that_arrives() -> None:
    """They send garbage and repeat Gloo's handshakes, or say nothing, and stay."""
    with members(2) as receivers:
        group = form_group(receivers, TIMEOUT_S, "ipc", hosts=["b", "c"])
        ports = listening([os.getpid(), *(receiver.process.pid for receiver in receivers)])
        assert len(ports) >= 4, "the store's, and one of Gloo's at each end"
        sender = WeightSender(group, MANIFEST, BUCKET_BYTES)
        with strangers((port.number for port in ports), rounds=3):
            for version in (1, 2):
                assert send(receivers, sender, version) == [fingerprint(TENSORS)] * 2
        group.close()


def received(version: int) -> tuple[ReceiveBuffer, WeightGroup]:
    """A worker's buffer with this version of the learner, and the learner's group."""
    group = WeightGroup.create_master("127.0.0.1", 2, "ipc", TIMEOUT_S)
    buffer = ReceiveBuffer(torch.device("cpu"))
    joining = buffer.join(group.address, 1, 2, "ipc", MANIFEST, TIMEOUT_S)
    group.connect()
    joining.result()
    receiving = buffer.receive(version, 0)
    WeightSender(group, MANIFEST, BUCKET_BYTES).send(version, TENSORS)
    receiving.result()
    return buffer, group


def test_a_worker_sends_a_newcomer_what_it_has_and_stays_in_the_learners_group() -> None:
    (buffer, group), newcomer = received(4), ReceiveBuffer(torch.device("cpu"))
    address, manifest = buffer.host("127.0.0.1", "ipc", TIMEOUT_S)
    sending = buffer.send(4, 0, BUCKET_BYTES)
    newcomer.join(address, 1, 2, "ipc", manifest, TIMEOUT_S).result()
    newcomer.receive(4, 0).result()
    sending.result()
    assert fingerprint(newcomer.take(4)) == fingerprint(buffer.take(4)) == fingerprint(TENSORS)
    receiving = buffer.receive(5, 0)
    WeightSender(group, MANIFEST, BUCKET_BYTES).send(5, TENSORS)
    receiving.result()
    for end in (buffer, newcomer):
        end.close()


def test_a_publish_ends_what_a_worker_sends_to_a_newcomer() -> None:
    buffer, group = received(4)
    buffer.host("127.0.0.1", "ipc", TIMEOUT_S)
    sending = buffer.send(4, 0, BUCKET_BYTES)
    receiving = buffer.receive(5, 0)
    WeightSender(group, MANIFEST, BUCKET_BYTES).send(5, TENSORS)
    receiving.result()
    with pytest.raises(WeightsError):
        sending.result()
    buffer.close()


def test_a_leader_that_is_stopped_fails_the_transfer_at_its_deadline() -> None:
    timeout_s = 1.0
    with members(3) as receivers:
        group = form_group(receivers, timeout_s, "ipc", hosts=["b", "b", "c"])
        for receiver in receivers[1:]:
            receiver.start("receive", MANIFEST, 1)
        os.kill(receivers[0].process.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        with pytest.raises(WeightsError):
            WeightSender(group, MANIFEST, BUCKET_BYTES).send(1, TENSORS)
        assert all(isinstance(receiver.result(), Failed) for receiver in receivers[1:])
        assert time.monotonic() - began_s < 10 * timeout_s
