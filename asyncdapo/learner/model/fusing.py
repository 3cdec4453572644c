"""Fusing: which parts of a model compute with fused ops (`fused_ops`) from now on.

In: a Hugging Face model, with or without memory for its weights. Out: the same model, whose RMS norms, gated MLPs and
rotation are computed in one pass each, in float32 on a CPU; all else, and without a C compiler, as before.

Invariant: nothing is known by its name alone. A part is fused if, with a few random weights and inputs, it gives what
the fused op gives: norms that add 1 to their weight, other activations and other rotations stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from asyncdapo.learner.model.fused_ops import can_fuse, library, rms_norm, rotate, swiglu

ROTATION = "apply_rotary_pos_emb"
"""What attention calls it, in the module that defines its class."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NUM_ROWS, NUM_INPUTS, NUM_INNER = 3, 4, 6
"""Of what a part is tried with."""


@torch.no_grad()
def fuse(model: PreTrainedModel) -> None:
    """Changes nothing that the model computes, but for rounding."""
    if library() is None:
        return
    for module in model.modules():
        if _is_norm(module):
            _fuse_norm(module)
        elif _is_gated_mlp(module):
            _fuse_gated_mlp(module)
        else:
            _fuse_rotation(sys.modules[type(module).__module__])


class FusedRotation:
    """In the place of `apply_rotary_pos_emb`."""

    def __init__(self, plain: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._plain = plain

    def __call__(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        num_sequences, _, num_tokens, head_dim = query.shape
        fits = cos.shape == (num_sequences, num_tokens, head_dim) and not (more or named)
        if not (fits and can_fuse(query, key, cos, sin)):
            return self._plain(query, key, cos, sin, *more, **named)
        return rotate(query, cos, sin), rotate(key, cos, sin)


def _fuse_rotation(source: ModuleType) -> None:
    """Of all attention that this module of Python defines."""
    plain = getattr(source, ROTATION, None)
    if plain is None or isinstance(plain, FusedRotation):
        return
    query, key = _random(1, 2, NUM_ROWS, NUM_INPUTS), _random(1, 1, NUM_ROWS, NUM_INPUTS)
    angles = _random(1, NUM_ROWS, NUM_INPUTS), _random(1, NUM_ROWS, NUM_INPUTS)
    fused = FusedRotation(plain)
    if all(map(_close, plain(query, key, *angles), fused(query, key, *angles))):
        setattr(source, ROTATION, fused)


def _is_norm(module: nn.Module) -> bool:
    x, weight = _random(NUM_ROWS, NUM_INPUTS), _random(NUM_INPUTS)
    if [name for name, _ in module.named_parameters()] != ["weight"] or not isinstance(_epsilon(module), float):
        return False
    return _gives(module, {"weight": weight}, x, rms_norm(x, weight, _epsilon(module)))


def _fuse_norm(module: nn.Module) -> None:
    plain, epsilon = module.forward, _epsilon(module)

    def forward(x: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        return rms_norm(x, weight, epsilon) if can_fuse(x, weight) else plain(x)

    module.forward = forward


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def _is_gated_mlp(module: nn.Module) -> bool:
    names = {f"{name}.weight" for name in PROJECTIONS}
    if {name for name, _ in module.named_parameters()} - {f"{name}.bias" for name in PROJECTIONS} != names:
        return False
    x, gate, up = _random(NUM_ROWS, NUM_INPUTS), _random(NUM_INNER, NUM_INPUTS), _random(NUM_INNER, NUM_INPUTS)
    down = _random(NUM_INPUTS, NUM_INNER)
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    zeros = {name.replace("weight", "bias"): torch.zeros(len(weights[name])) for name in weights}
    known = dict(module.named_parameters())
    weights |= {name: bias for name, bias in zeros.items() if name in known}
    return _gives(module, weights, x, swiglu(x @ gate.T, x @ up.T) @ down.T)


def _fuse_gated_mlp(module: nn.Module) -> None:
    plain = module.forward
    gate_proj, up_proj, down_proj = (module.get_submodule(name) for name in PROJECTIONS)

    def forward(x: Tensor) -> Tensor:
        fits = can_fuse(x, up_proj.get_parameter("weight"))
        return down_proj(swiglu(gate_proj(x), up_proj(x))) if fits else plain(x)

    module.forward = forward


def _gives(module: nn.Module, weights: dict[str, Tensor], x: Tensor, expected: Tensor) -> bool:
    try:
        return _close(functional_call(module, weights, (x,)), expected)
    except (RuntimeError, TypeError):  # it takes something else
        return False


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)
