"""Packed weights: a set of weights in the layout of `forward.c`.

In: as `weights.py`. Out: each projection as panels of 32 outputs, [panel, input, output in the panel], the last one
filled up with zeros, and the addresses of all tensors. Besides, one layer is held as `weights.py` has it: it is read
into that, and packed from there.

Shapes: I inputs, O outputs, P panels, C = 32 outputs of a panel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch.nn.functional import pad

from asyncdapo.rollout.torch_engine.checkpoint import ModelShape
from asyncdapo.rollout.torch_engine.weights import LayerWeights, Unread, Weights

PANEL = 32
PROJECTIONS = ("qkv", "out", "gate_up", "down")


class PackedWeights(Weights):
    """One full set in float32 on the CPU; `fill` overwrites it in place."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape, torch.float32, torch.device("cpu"), num_layers=1)
        self._head = _panels(self.head.t())
        self._packed = [self._new_packed_layer() for _ in range(shape.num_layers)]
        tensors = [self.embedding, self.norm, self._head]
        tensors += [getattr(layer, field.name) for layer in self._packed for field in fields(LayerWeights)]
        self.addresses = torch.tensor([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        """int64, in the order of `Weights` in forward.c; 0 for what the model doesn't have."""

    def fill(self, named: Mapping[str, torch.Tensor]) -> None:
        super().fill(named)
        _pack(self.head.t(), self._head)

    def _fill_layer(self, unread: Unread, index: int) -> None:
        [plain], packed = self.layers, self._packed[index]
        self._read_layer(unread, f"model.layers.{index}.", plain)
        for field in fields(LayerWeights):
            source, target = getattr(plain, field.name), getattr(packed, field.name)
            if field.name in PROJECTIONS:
                _pack(source, target)
            elif source is not None:
                target.copy_(source)

    def _new_packed_layer(self) -> LayerWeights:
        layer = self._new_layer()
        return replace(layer, **{name: _panels(getattr(layer, name)) for name in PROJECTIONS})


def _panels(weight_IO: torch.Tensor) -> torch.Tensor:
    num_inputs, num_outputs = weight_IO.shape
    return torch.zeros(-(-num_outputs // PANEL), num_inputs, PANEL)


def _pack(weight_IO: torch.Tensor, panels_PIC: torch.Tensor) -> None:
    whole_IO = pad(weight_IO, (0, -weight_IO.shape[1] % PANEL))
    panels_PIC.copy_(whole_IO.unflatten(1, (-1, PANEL)).transpose(0, 1))
