"""Weights to workers on several hosts. Hosts are planted: the processes are on this machine."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from asyncdapo.errors import WeightsError
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.sender import WeightSender
from tests.weights.members import Failed, Member, fingerprint, form_group, members

BUCKET_BYTES = 4096
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
    timeout_s = 20.0
    with members(3) as receivers:
        survivors = [receiver for receiver in receivers if receiver is not receivers[victim]]
        group = form_group(receivers, timeout_s, "ipc", hosts=["b", "b", "c"])
        for receiver in survivors:
            receiver.start("receive", MANIFEST, 1)
        receivers[victim].start("die_in_transfer", MANIFEST, 1, 64)
        began_s = time.monotonic()
        with pytest.raises(WeightsError):
            WeightSender(group, MANIFEST, 64).send(1, TENSORS)
        assert all(isinstance(receiver.result(), Failed) for receiver in survivors)
        assert time.monotonic() - began_s < timeout_s

        group = form_group(survivors, backend="ipc")
        assert send(survivors, WeightSender(group, MANIFEST, BUCKET_BYTES), 2) == [fingerprint(TENSORS)] * 2
        group.close()


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
