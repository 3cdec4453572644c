"""Weights travel from a learner (this process) to receivers in processes of their own: over Gloo, or through shared
memory."""

from __future__ import annotations

import time
from threading import Thread

import pytest
import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport import carrier
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.deadline import Deadline
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.sender import WeightSender
from tests.weights.members import Failed, fingerprint, form_group, members

BUCKET_BYTES = 4096

both_ways = pytest.mark.parametrize("backend", ["gloo", "ipc"])


def many_tensors() -> dict[str, torch.Tensor]:
    """Every kind that could go wrong: dtypes, a scalar, an empty one, odd sizes, views, one of many buckets."""
    draw = torch.Generator().manual_seed(7)
    normal = torch.randn(64, 33, generator=draw)
    return {
        "embed": torch.randn(1000, 17, generator=draw),
        "bf16": normal.to(torch.bfloat16),
        "fp16": normal.to(torch.float16),
        "fp64": normal.to(torch.float64),
        "fp8": normal.to(torch.float8_e4m3fn),
        "int8": torch.arange(-100, 101, dtype=torch.int8),
        "int64": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.view_as_complex(torch.randn(3, 2, generator=draw)),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "transposed": normal.t(),
        "strided": normal[::2, 1:5],
    }


@both_ways
@pytest.mark.parametrize("num_receivers", [1, 2, 3])
def test_every_receiver_gets_every_tensor_bit_by_bit(num_receivers: int, backend: Backend):
    tensors = many_tensors()
    manifest = Manifest.of(tensors)
    with members(num_receivers) as receivers:
        group = form_group(receivers, backend=backend)
        sender = WeightSender(group, manifest, BUCKET_BYTES)
        for version in (1, 2):
            for receiver in receivers:
                receiver.start("receive", manifest, version)
            report = sender.send(version, tensors)
            assert [receiver.result() for receiver in receivers] == [fingerprint(tensors)] * num_receivers
            assert (report.version, report.num_bytes) == (version, manifest.num_bytes)
            tensors["embed"] = tensors["embed"] + 1
        group.close()


def test_the_sender_converts_to_the_dtype_of_the_manifest():
    tensors = {"weight": torch.randn(300, 70), "steps": torch.arange(3)}
    manifest = Manifest.of(tensors, torch.bfloat16)
    with members(1) as [receiver]:
        group = form_group([receiver])
        receiver.start("receive", manifest, 1)
        WeightSender(group, manifest, BUCKET_BYTES).send(1, tensors)
        wanted = {"weight": tensors["weight"].to(torch.bfloat16), "steps": tensors["steps"]}
        assert receiver.result() == fingerprint(wanted)


@both_ways
def test_another_version_branch_or_manifest_is_refused_by_all_and_the_group_stays_in_step(backend: Backend):
    tensors = {"weight": torch.randn(5000)}
    manifest = Manifest.of(tensors)
    other = Manifest.of({"renamed": tensors["weight"]})
    with members(2) as receivers:
        group = form_group(receivers, backend=backend)
        sender = WeightSender(group, manifest, BUCKET_BYTES)
        for expected, reason in [
            ((manifest, 4, 1), "rank 1 expects another version"),
            ((manifest, 3, 0), "rank 1 expects another branch"),
            ((other, 3, 1), "rank 1 has a manifest of other tensors"),
        ]:
            receivers[0].start("receive", *expected)
            receivers[1].start("receive", manifest, 3, 1)
            with pytest.raises(WeightsError, match=reason):
                sender.send(3, tensors, branch=1)
            for receiver in receivers:
                refused = receiver.result()
                assert isinstance(refused, Failed)
                assert reason in refused.reason
        assert not group.closed
        for receiver in receivers:
            receiver.start("receive", manifest, 3, 1)
        sender.send(3, tensors, branch=1)
        assert [receiver.result() for receiver in receivers] == [fingerprint(tensors)] * 2


@both_ways
def test_one_flipped_bit_at_one_receiver_is_found_and_nobody_uses_the_weights(backend: Backend):
    tensors = {"weight": torch.randn(5000)}
    manifest = Manifest.of(tensors)
    with members(2) as receivers:
        group = form_group(receivers, backend=backend)
        receivers[0].start("receive", manifest, 1)
        receivers[1].start("receive_flipped", manifest, 1)
        with pytest.raises(WeightsError, match=r"rank 2 the weights arrived changed \(checksum\)"):
            WeightSender(group, manifest, BUCKET_BYTES).send(1, tensors)
        for receiver in receivers:
            outcome = receiver.result()
            assert isinstance(outcome, Failed)
            assert "rank 2 the weights arrived changed" in outcome.reason


@both_ways
def test_a_receiver_killed_in_a_transfer_fails_it_for_all_and_a_new_group_works(backend: Backend):
    tensors = {"weight": torch.randn(1 << 16)}
    manifest = Manifest.of(tensors)
    timeout_s = 20.0
    with members(3) as receivers:
        *survivors, victim = receivers
        group = form_group(receivers, timeout_s, backend)
        for receiver in survivors:
            receiver.start("receive", manifest, 1)
        victim.start("die_in_transfer", manifest, 1)
        began_s = time.monotonic()
        with pytest.raises(WeightsError):
            WeightSender(group, manifest, 64).send(1, tensors)
        assert time.monotonic() - began_s < timeout_s
        assert group.closed
        for receiver in survivors:
            outcome = receiver.result()
            assert isinstance(outcome, Failed)
            assert outcome.after_s < timeout_s

        group = form_group(survivors, backend=backend)
        for receiver in survivors:
            receiver.start("receive", manifest, 1)
        WeightSender(group, manifest, 1 << 20).send(1, tensors)
        assert [receiver.result() for receiver in survivors] == [fingerprint(tensors)] * 2


@both_ways
def test_a_silent_sender_fails_the_receivers_at_their_deadline_and_other_threads_run_meanwhile(backend: Backend):
    manifest = Manifest.of({"weight": torch.randn(10)})
    with members(2) as receivers:
        group = form_group(receivers, timeout_s=1.0, backend=backend)
        receivers[0].start("receive", manifest, 1)
        receivers[1].start("count_during_receive", manifest, 1)
        outcome, num_naps = (receiver.result() for receiver in receivers)
        assert isinstance(outcome, Failed)
        assert "no end within 1 s" in outcome.reason
        assert num_naps > 20
        group.close()


@both_ways
def test_a_silent_receiver_fails_the_sender_at_its_deadline_and_other_threads_run_meanwhile(backend: Backend):
    tensors = {"weight": torch.randn(10)}
    with members(1) as [receiver]:
        group = form_group([receiver], timeout_s=1.0, backend=backend)
        errors: list[WeightsError] = []

        def send() -> None:
            try:
                WeightSender(group, Manifest.of(tensors), BUCKET_BYTES).send(1, tensors)
            except WeightsError as error:
                errors.append(error)

        thread = Thread(target=send)
        thread.start()
        num_naps = 0
        while thread.is_alive():
            time.sleep(0.01)
            num_naps += 1
        assert "no end within 1 s" in str(errors[0])
        assert num_naps > 20
        assert group.closed


def test_tensors_that_do_not_fit_the_manifest_are_refused_before_anything_is_sent():
    tensors = {"weight": torch.randn(10)}
    with members(1) as [receiver]:
        group = form_group([receiver])
        sender = WeightSender(group, Manifest.of(tensors), BUCKET_BYTES)
        with pytest.raises(ValueError, match="differ in.*extra"):
            sender.send(1, tensors | {"extra": torch.zeros(1)})
        with pytest.raises(ValueError, match="has shape"):
            sender.send(1, {"weight": torch.randn(5, 2)})
        group.close()


@both_ways
def test_closing_the_group_fails_the_receivers_that_wait_in_it_before_their_deadline(backend: Backend):
    manifest = Manifest.of({"weight": torch.randn(10)})
    timeout_s = 20.0
    with members(2) as receivers:
        group = form_group(receivers, timeout_s, backend)
        for receiver in receivers:
            receiver.start("receive", manifest, 1)
        group.close()
        for receiver in receivers:
            outcome = receiver.result()
            assert isinstance(outcome, Failed)
            assert outcome.after_s < timeout_s


def test_a_deadline_has_passed_once_torch_may_have_counted_its_whole_milliseconds():
    """What torch gives up on then is said to be the deadline's doing, and not an error of its own."""
    assert Deadline(0.001).passed
    assert not Deadline(1.0).passed


def test_memory_that_can_not_be_shared_fails_the_sender_in_a_line(monkeypatch) -> None:
    def refused(num_bytes: int, device: torch.device) -> None:
        raise OSError("an invalid argument; use weights.backend=gloo")

    monkeypatch.setattr(carrier, "make_block", refused)
    tensors = {"weight": torch.randn(100)}
    with members(1) as receivers:
        group = form_group(receivers, backend="ipc")
        with pytest.raises(WeightsError, match="the memory of rank 0 can't be shared: an invalid argument; use"):
            WeightSender(group, Manifest.of(tensors), BUCKET_BYTES)
        group.close()
