"""How each block of the model is computed: compiled or not, and what its backward pass computes again.

    none         everything that the backward pass needs is kept
    selective    the MLP keeps its input; what is inside of it is computed again
    full         the block keeps its input

A compiled block runs inside of its checkpoint, the checkpoint of an MLP inside of its compiled block. Attention is no
part of what is compiled: it breaks the graph, so that neither lengths nor layouts are compiled in, and all blocks and
micro-batches share a few graphs. Invariant: gradients are those of the plain model. Passes without gradient keep
nothing anyway and go without checkpoints. Does not own: attention, embedding, output layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from asyncdapo.errors import ConfigError
from asyncdapo.learner.model.compiler import KEY as COMPILE
from asyncdapo.learner.model.compiler import check_compiler
from asyncdapo.learner.model.logprobs import compile_chunks

CHECKPOINTING = "learner.activation_checkpointing"


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Whether blocks are compiled: on a GPU, unless asked otherwise. Raises ConfigError where they can't be."""
    if not (device.type == "cuda" if asked is None else asked):
        return False
    check_compiler(device.type, asked)
    return True


def settle_blocks(model: PreTrainedModel, device: torch.device, *, compile: bool, checkpointing: str) -> None:
    """Have each block of the model computed so from now on, on this device; once for a model. Raises ConfigError for
    one whose blocks, or their MLPs, can't be told."""
    if not compile and checkpointing == "none":
        return
    key, value = (CHECKPOINTING, checkpointing) if checkpointing != "none" else (COMPILE, True)
    blocks = decoder_blocks(model)
    if not blocks:
        problem = f"needs a model whose blocks can be told, {type(model).__name__} is none"
        raise ConfigError(key, problem, value, "none" if checkpointing != "none" else "false")
    if compile and device.type == "cuda":
        compile_chunks()  # on a CPU a chunk's products take the time
    for block in blocks:
        if checkpointing == "selective":
            _checkpoint(_mlp_of(block))
        if compile:
            block.forward = torch.compile(block.forward, dynamic=True)
        if checkpointing == "full":
            _checkpoint(block)


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """In their order; none where they can't be told."""
    layers = getattr(model.base_model, "layers", None)
    if isinstance(layers, nn.ModuleList):
        return list(layers)
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _mlp_of(block: nn.Module) -> nn.Module:
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        problem = f"computes the MLP of a block again, and {type(block).__name__} has none of that name"
        raise ConfigError(CHECKPOINTING, problem, "selective", "full")
    return mlp


def _checkpoint(module: nn.Module) -> None:
    """Its forward pass keeps its inputs only. There is no dropout, so no random state to bring back either."""
    forward: Callable[..., Any] = module.forward

    def keeping_inputs(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    module.forward = keeping_inputs
