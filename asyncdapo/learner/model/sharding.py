"""Sharding: the weights, gradients and optimizer states of a policy, divided among the ranks of a mesh by FSDP2.

    a block's shards ──gathered, in the dtype of the passes──▶ forward ──freed──▶ gathered again ▶ backward ──▶ freed
                                                                                                   │ its gradient
    float32 shards of every rank ◀── AdamW ◀── float32 gradients of the shards ◀── summed over shards ◀─┘ and replicas

In: a policy whose blocks are settled (`blocks`: checkpointing, then compile, then this), and a mesh of replicas ×
shards. Out: the same policy, whose parameters are DTensors; one rank is a mesh of one. Invariants: a rank holds
weights, gradients and optimizer states of its shard alone, in float32; gradients are sums, not averages, reduced in
float32. Every rank makes the same passes in the same order. Does not own: the passes (`policy`), the collectives
(PyTorch's).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from asyncdapo.learner.model.blocks import decoder_blocks
from asyncdapo.learner.model.mesh import REPLICAS, SHARDS
from asyncdapo.learner.model.names import once
from asyncdapo.learner.model.policy import ENTRIES, Policy
from asyncdapo.native.malloc import keep_freed_memory, return_freed_memory

GATHERED_BYTES = 16 << 20
"""Blocks smaller than this are gathered together with all else: on their own they would save little memory, and the
hooks of each cost a small model 3 % of its step."""


def shard(
    policy: Policy, mesh: DeviceMesh, *, dtype: torch.dtype, reshard_after_forward: bool = True, offload: bool = False
) -> None:
    """Divide the policy's weights among the mesh. Passes compute in `dtype`. `reshard_after_forward`: whether a block's
    gathered weights are freed between forward and backward pass. `offload`: whether shards, their gradients and the
    optimizer states are in host memory."""
    weights = next(policy.parameters()).dtype
    lower = dtype if dtype.itemsize < weights.itemsize and dtype != torch.float32 else None
    mp_policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=lower and weights, cast_forward_inputs=False)
    if mesh.device_type == "cpu" and mesh[SHARDS].size() > 1:
        return_freed_memory()
    elif mesh.device_type == "cpu":
        keep_freed_memory()
    offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    large = [block for block in decoder_blocks(policy.model) if _num_bytes(block.parameters()) >= GATHERED_BYTES]
    for module in (*large, policy):
        fully_shard(
            module,
            mesh=mesh if mesh[REPLICAS].size() > 1 else mesh[SHARDS],
            mp_policy=mp_policy,
            offload_policy=offload_policy,
            reshard_after_forward=reshard_after_forward and module is not policy,
        )
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_reduce_scatter_unused_params(True)
    policy.num_shards = mesh[SHARDS].size()
    for method in ENTRIES:
        register_fsdp_forward_method(policy, method)


def before_backward(policy: Policy, *, is_last: bool) -> None:
    """Say before each forward pass of an update whether its backward pass is the last one. Gradients are summed over
    replicas in the last one alone. Over shards they are summed in each, since a rank has no memory for whole gradients;
    where there is one shard, that sum would be a copy."""
    root = cast(FSDPModule, policy)
    if policy.num_shards == 1:
        root.set_requires_gradient_sync(is_last)
    else:
        root.set_requires_all_reduce(is_last)


def free_gathered(policy: Policy) -> None:
    """Before the shards change: free the weights that a pass without gradient has left gathered, which the next pass
    would compute with."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_shards(policy: Policy) -> dict[str, DTensor]:
    """What is trained by Hugging Face names, tied weights once: live, and the same names in the same order at every
    rank. They are what a safetensors file has, buffers aside. `Policy.parameters` are others while weights are
    gathered, as some still are after a pass without gradient."""
    state = once(policy.model.state_dict(keep_vars=True))
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}


def gather(tensor: Tensor) -> Tensor:
    """The whole of what has shards, detached: every rank of the replica has to call it. Where there is one shard, or
    none, it is the live tensor and no copy."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return (tensor.full_tensor() if tensor.device_mesh.size(-1) > 1 else tensor.to_local()).detach()


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
