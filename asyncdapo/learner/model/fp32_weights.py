"""Masters: the float32 weights that are trained, behind a model that computes in another dtype.

    masters ──rounded, after each update──▶ parameters of the model ──forward, backward──▶ gradients in their dtype
       ▲                                                                                       │ added at once
       └──────────────── optimizer ◀── `.grad` of the masters, float32 ◀───────────────────────┘

In: a model as it was loaded, in float32. Out: tensors to train (`parameters`), their values by Hugging Face names, and
a model whose parameters have the dtype that it computes in. Invariants: a master holds the loaded value exactly, and
every update of it however small; a gradient never waits in a narrower dtype than float32: as soon as autograd has one
it is added to the master's and freed. Where the model computes in float32 its own parameters are the masters, and
nothing is copied or hooked. Buffers (such as the frequencies of the rotation) stay as they are. Does not own: the
optimizer, when an update is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncdapo.errors import RunError
from asyncdapo.learner.model.names import once


class Masters:
    """Of one model. `dtype`: what it computes in from now on; tied weights have one master."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._copies = list(model.parameters())
        self.parameters: list[nn.Parameter] = self._copies
        """What is trained: `.grad` is the sum of all backward passes since the last update."""
        if any(parameter.dtype != dtype for parameter in self._copies):
            self.parameters = [nn.Parameter(parameter.data) for parameter in self._copies]
            compute_in(model, dtype)
            for copy, master in zip(self._copies, self.parameters, strict=True):
                copy.register_post_accumulate_grad_hook(_moves_gradient_to(master))
        self._master_of: dict[int, Tensor] = {
            id(copy): master for copy, master in zip(self._copies, self.parameters, strict=True)
        }

    def named(self) -> dict[str, Tensor]:
        """The live masters by their Hugging Face names, detached, tied ones once: what a safetensors file has."""
        return {name: tensor.detach() for name, tensor in once(self.state_dict()).items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """After an update: the model computes with the masters' values, rounded to its dtype."""
        for copy, master in zip(self._copies, self.parameters, strict=True):
            if copy is not master:
                copy.copy_(master)

    def state_dict(self) -> dict[str, Tensor]:
        """As the model's own, tied weights under each of their names, with masters in place of its parameters."""
        live: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        return {name: self._master_of.get(id(tensor), tensor) for name, tensor in live.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over all values of such a dict. Raises RunError, with nothing changed, where one is missing or has
        another shape."""
        own = self.state_dict()
        wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
        if wrong:
            raise RunError(f"{len(wrong)} weights are missing or of another shape than the model's, {wrong[0]} first")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.refresh()

    def save(self, directory: Path) -> None:
        """Write the model in Hugging Face format: the same files whatever it computes in."""
        self._model.save_pretrained(directory, state_dict=self.state_dict())
        config = self._model.config  # has the dtype of the model's own parameters
        config.dtype = str(self.parameters[0].dtype).removeprefix("torch.")
        config.save_pretrained(directory)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters to this dtype; tied ones stay tied, buffers as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _moves_gradient_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook for the parameter that stands in for this master in forward and backward passes."""

    @torch.no_grad()
    def move(copy: Tensor) -> None:
        assert copy.grad is not None, "the hook runs after a gradient has come"
        if master.grad is None:
            master.grad = copy.grad.to(master.dtype)
        else:
            master.grad.add_(copy.grad)
        copy.grad = None

    return move
