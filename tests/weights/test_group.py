"""The process group of a transfer: joining it, its end, and what is left of it afterwards."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport import process_group
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.keys import RunKeys
from asyncdapo.transport.store import join_address
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.sender import WeightSender
from tests.ports import listening
from tests.weights.members import Failed, form_group, members

SLACK_S = 10.0
"""Of a busy machine, behind a deadline. What torch would wait by itself is minutes."""

BUCKET_BYTES = 4096

both_ways = pytest.mark.parametrize("backend", ["gloo", "ipc"])


def test_a_group_that_stays_incomplete_names_the_missing_ranks():
    with members(1) as [receiver]:
        group = WeightGroup.create_master("127.0.0.1", 3, "gloo", 1.0)
        receiver.start("join", group.address, 2, 3, "gloo", 1.0)
        with pytest.raises(WeightsError, match=r"ranks \[1\] of 3 did not join"):
            group.connect()
        assert isinstance(receiver.result(), Failed)
        assert group.closed


def test_a_rank_that_leaves_waits_no_longer_for_one_that_says_nothing():
    """Rank 1 is in the group and takes part in no exchange, as if it were stopped."""
    first = WeightGroup.create_master("127.0.0.1", 2, "gloo", 20.0)
    with ThreadPoolExecutor(2) as threads:
        joining = threads.submit(WeightGroup.join, first.address, 1, 2, "gloo", 20.0)
        first.connect()
        silent = joining.result()
        waiting = threads.submit(first.exchange, 1, Deadline(20.0))
        time.sleep(0.05)
        assert not waiting.done()
        first.close()
        with pytest.raises(WeightsError, match="the group of the weights is closed"):
            waiting.result(5)
        silent.close()


def address_at(port: int) -> str:
    return join_address("127.0.0.1", port, RunKeys.make().client)


def test_joining_where_no_learner_listens_ends_at_the_deadline():
    timeout_s = 2.0
    began_s = time.monotonic()
    with pytest.raises(WeightsError, match="rank 1 of 2 could not open the store"):
        WeightGroup.join(address_at(1), 1, 2, "gloo", timeout_s)
    assert time.monotonic() - began_s < timeout_s + SLACK_S


def test_joining_a_learner_that_takes_connections_and_never_answers_ends_at_the_deadline():
    timeout_s = 1.0
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began_s = time.monotonic()
        with pytest.raises(WeightsError, match="rank 1 of 2 could not open the store: no end within 1 s"):
            WeightGroup.join(address_at(silent.getsockname()[1]), 1, 2, "gloo", timeout_s)
        assert time.monotonic() - began_s < timeout_s + SLACK_S


def test_a_learner_that_is_stopped_while_others_join_fails_them_at_the_deadline():
    timeout_s = 1.0
    with members(2) as [learner, receiver]:
        address = learner.do("open", 3, timeout_s)
        receiver.start("join", address, 1, 3, "gloo", timeout_s)
        os.kill(learner.process.pid, signal.SIGSTOP)
        assert isinstance(failed := receiver.result(), Failed)
        assert failed.after_s < timeout_s + SLACK_S


@both_ways
def test_a_group_goes_with_its_last_user_and_not_at_the_next_garbage_collection(backend: Backend):
    """Its buffers are large, perhaps on a GPU, and it has threads and file descriptors."""
    tensors = {"weight": torch.randn(10)}
    gc.disable()
    try:
        with members(1) as [receiver]:
            group = form_group([receiver], backend=backend)
            manifest = Manifest.of(tensors)
            sender = WeightSender(group, manifest, BUCKET_BYTES)
            receiver.start("receive", manifest, 1)
            sender.send(1, tensors)
            group.close()
            watched = weakref.ref(group)
            del group, sender
            assert watched() is None
    finally:
        gc.enable()


@both_ways
def test_a_group_that_failed_goes_with_its_last_user_too(backend: Backend):
    """Until then its connections are open, and the other ranks wait for it."""
    tensors = {"weight": torch.randn(1 << 16)}
    manifest = Manifest.of(tensors)
    gc.disable()
    try:
        with members(1) as [victim]:
            group = form_group([victim], backend=backend)
            watched = weakref.ref(group)
            victim.start("die_in_transfer", manifest, 1)
            assert not sent(WeightSender(group, manifest, 64), tensors)
            del group
            assert watched() is None
    finally:
        gc.enable()


def sent(sender: WeightSender, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether it could be; nothing holds on to the error."""
    try:
        sender.send(1, tensors)
    except WeightsError:
        return False
    return True


def test_a_closed_group_says_so():
    tensors = {"weight": torch.randn(10)}
    with members(1) as [receiver]:
        group = form_group([receiver])
        sender = WeightSender(group, Manifest.of(tensors), BUCKET_BYTES)
        group.close()
        with pytest.raises(WeightsError, match="closed"):
            sender.send(1, tensors)


def test_a_group_that_nobody_has_joined_yet_says_so():
    group = WeightGroup.create_master("127.0.0.1", 2, "gloo", 1.0)
    with pytest.raises(WeightsError, match="isn't connected yet"):
        group.exchange(0, Deadline(1.0))
    group.close()


def test_a_rank_that_does_not_know_the_keys_is_refused_by_the_others():
    with members(1) as [stranger]:
        assert stranger.do("forge") is None
        with pytest.raises(WeightsError, match="could not connect: a stranger is in the place of rank 1"):
            form_group([stranger])


Strangers = list[socket.socket]


def taking_places(monkeypatch: pytest.MonkeyPatch, times: int) -> Strangers:
    """Silent strangers know Gloo's protocol, and connect to so many ranks before the others do: a handshake replayed at
    the worst moment."""
    make, taken, attacked = process_group._gloo_device, [], []

    def make_and_take(address: str) -> object:
        before = set(listening([os.getpid()]))
        device = make(address)
        for port in set(listening([os.getpid()])) - before if len(attacked) < times else ():
            attacked.append(port)
            for number in range(4):
                taken.append(socket.create_connection(("127.0.0.1", port.number)))
                taken[-1].sendall(number.to_bytes(8, "little"))
        return device

    monkeypatch.setattr(process_group, "_gloo_device", make_and_take)
    return taken


def test_a_silent_stranger_in_a_rank_s_place_costs_one_short_try_and_the_group_forms(monkeypatch):
    strangers, timeout_s, began_s = taking_places(monkeypatch, times=2), 40.0, time.monotonic()
    group = WeightGroup.create_master("127.0.0.1", 2, "gloo", timeout_s)
    with ThreadPoolExecutor(1) as other:
        joining = other.submit(WeightGroup.join, group.address, 1, 2, "gloo", timeout_s)
        group.connect()
        took_s = time.monotonic() - began_s
        words = other.submit(joining.result().exchange, 8, Deadline(5.0))
        assert group.exchange(7, Deadline(5.0)) == [7, 8] == words.result()
    assert strangers
    assert took_s < timeout_s / 4
    for one in (group, joining.result()):
        one.close()


def test_strangers_who_are_quicker_at_every_try_cost_that_group_alone(monkeypatch):
    strangers, timeout_s = taking_places(monkeypatch, times=99), 20.0
    monkeypatch.setattr(process_group, "PROOFS_S", (0.1, 0.2))
    group = WeightGroup.create_master("127.0.0.1", 2, "gloo", timeout_s)
    began_s = time.monotonic()
    with ThreadPoolExecutor(1) as other:
        joining = other.submit(WeightGroup.join, group.address, 1, 2, "gloo", timeout_s)
        with pytest.raises(WeightsError):
            group.connect()
        with pytest.raises(WeightsError):
            joining.result()
    assert time.monotonic() - began_s < timeout_s / 4
    assert len(strangers) > 4


class Looked:
    """A collective of NCCL that is over at the third look, and a wait of NCCL's own."""

    num_looks = waited_after = 0

    def is_completed(self) -> bool:
        self.num_looks += 1
        return self.num_looks == 3

    def wait(self, timeout: object) -> bool:
        self.waited_after = self.num_looks
        return True


def test_a_collective_of_nccl_is_looked_at_before_it_is_waited_for() -> None:
    group, work = WeightGroup.create_master("127.0.0.1", 2, "gloo", 5.0), Looked()
    group.backend = "nccl"
    group.wait(work, Deadline(5.0))
    assert work.waited_after == 3
    group.close()
