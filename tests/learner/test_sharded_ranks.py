"""Sharded ranks in real processes: what they hold, that faults in how they compute show, that a death ends a pass."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from asyncdapo.errors import RanksError
from asyncdapo.learner.model import policy as policy_module
from asyncdapo.learner.model import sharding
from asyncdapo.learner.model.logprobs import linear_logprobs
from asyncdapo.learner.model.packing import MicroBatch
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.step import ranks
from asyncdapo.learner.step.learner import Learner
from asyncdapo.learner.step.ranks import ALONE, Ranks
from tests.learner.ranks import die, in_processes, with_shards
from tests.learner.tiny import clipped_gradients, make_batch, make_exact_learner, make_learner, save_tiny_llama, train

LARGE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 2048}
BYTES_PER_PARAMETER = 16
"""float32 weight, gradient and two averages of AdamW."""
BATCH = make_batch(num_groups=8, seed=11)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


# ---------------------------------------------------------------------------------------------------------------- held


def held_bytes() -> int:
    """Of all tensors that this process has, each piece of memory once."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    whole = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in whole}
    return sum(storages.values())


def bytes_in_a_step(of_rank: Ranks, path: str, meshes: list[int]) -> list[int]:
    """With each number of shards: when the optimizer is done and the gradients are still there."""
    sharding.GATHERED_BYTES = 0
    found = []
    for num_shards in meshes:
        gc.collect()
        before = held_bytes()
        learner = make_learner(path, ranks=with_shards(of_rank, num_shards))
        learner._optimizer._adamw.register_step_post_hook(lambda *_: found.append(held_bytes() - before))  # noqa: B023
        train(learner, *BATCH)
        del learner
    return found


def test_a_rank_holds_its_shard_of_weights_gradients_and_averages_and_nothing_else(tmp_path) -> None:
    path, meshes = save_tiny_llama(tmp_path, **LARGE), [1, 2]
    num_parameters = sum(weight.numel() for weight in make_learner(path).weights().values())
    for of_rank in in_processes(2, bytes_in_a_step, path, meshes):
        for held, num_shards in zip(of_rank, meshes, strict=True):
            assert held == pytest.approx(BYTES_PER_PARAMETER * num_parameters / num_shards, rel=0.03)


# -------------------------------------------------------------------------------------------------------------- faults


def head_outside(policy: Policy, micro_batch: MicroBatch, *, entropy_gradient: bool = False) -> tuple:
    """The output layer's weights gathered by hand."""
    hidden_SH = policy.packed_outputs(micro_batch.tokens_S, micro_batch.positions_S, micro_batch.layout)
    head = policy_module._output_layer(policy.model)
    found = linear_logprobs(
        policy_module.gather_rows(hidden_SH, micro_batch.sources_n),
        sharding.gather(head.weight).requires_grad_(),
        micro_batch.targets_n,
        temperature=policy.temperature,
        entropy_gradient=entropy_gradient,
    )
    return tuple(map(micro_batch.rectangle, found))


def unclipped(path: str, **config) -> Learner:
    """Clipping would hide a gradient that is too small throughout."""
    return make_exact_learner(path, grad_clip=1e9, **config)


def first_gradient(learner: Learner) -> torch.Tensor:
    gradients = clipped_gradients(learner)
    train(learner, *BATCH)
    return gradients[0]


def gradients_with_faults(of_rank: Ranks, path: str) -> dict[str, torch.Tensor | Exception]:
    """Of two shards."""
    sharding.GATHERED_BYTES, found = 0, {}
    shards = with_shards(of_rank, 2)
    found["none"] = first_gradient(unclipped(path, ranks=shards))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda *_: None)
        found["divided"] = first_gradient(unclipped(path, ranks=shards))
    learner = unclipped(path, ranks=shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "__call__", head_outside)
        patch.setattr(type(learner._policy), "__call__", head_outside, raising=False)
        found["head outside"] = first_gradient(learner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "SYNC_TIMEOUT_S", 3.0)
        learner = unclipped(path, ranks=with_shards(of_rank, 2), tokens_per_microbatch=60)
        as_many = ranks.Ranks.as_many
        patch.setattr(ranks.Ranks, "as_many", lambda *args, **kwargs: as_many(*args, **kwargs)[of_rank.rank :])
        try:
            found["a pass fewer"] = first_gradient(learner)
        except RanksError as error:
            found["a pass fewer"] = error
    return found


def test_faults_in_how_shards_compute_show(path) -> None:
    expected = first_gradient(unclipped(path))
    for found in in_processes(2, gradients_with_faults, path):
        assert isinstance(found.pop("a pass fewer"), RanksError)
        apart = {fault: ((got - expected).norm() / expected.norm()).item() for fault, got in found.items()}
        assert apart.pop("none") < 1e-6
        assert all(difference > 0.01 for difference in apart.values()), apart


# --------------------------------------------------------------------------------------------------------------- deaths


def die_in_a_pass(of_rank: Ranks, path: str, victim: int, is_backward: bool) -> float | None:
    """How long a rank waits for one that dies in the middle of its second step."""
    sharding.GATHERED_BYTES = 0
    learner = make_learner(path, ranks=with_shards(of_rank, 2))
    train(learner, *BATCH)
    if of_rank.rank == victim:
        block = learner._policy.model.model.layers[0]
        add: Callable = block.register_full_backward_hook if is_backward else block.register_forward_hook
        add(lambda *_: die())
    began_s = time.monotonic()
    with pytest.raises(RanksError):
        train(learner, *make_batch(step=2, num_groups=8))
    return time.monotonic() - began_s


@pytest.mark.parametrize(("victim", "is_backward"), [pytest.param(3, False, marks=pytest.mark.soak), (0, True)])
def test_a_rank_that_dies_in_a_pass_fails_all_others_at_once(path, victim, is_backward) -> None:
    outcomes = in_processes(4, die_in_a_pass, path, victim, is_backward)
    assert outcomes.pop(victim) is None
    assert all(waited_s is not None and waited_s < ranks.SYNC_TIMEOUT_S / 20 for waited_s in outcomes), outcomes


def test_one_rank_has_a_mesh_of_one() -> None:
    assert ALONE.mesh(torch.device("cpu")).shape == (1, 1)
