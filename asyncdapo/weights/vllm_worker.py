"""What of the weights lives in vLLM's worker processes: their end of the group, and how a version gets into the model.

vLLM imports this module in each of its workers because the engine names `WorkerEnd` as a worker extension; the import
registers the transfer backend `TRANSFER`. The engine's process calls `WorkerEnd` by remote procedure calls, whose
arguments and answers are plain. vLLM calls `StagedTransfer` between two tokens, when generation is paused.

In: the learner's stream, into `staging` while the model generates; then the number of the version to be loaded. Out:
the model computes with that version, in vLLM's own layout of it. Invariant: all of a load happens inside of one call
that either loads every parameter or raises; a model that lacks a tensor is refused before anything is touched. A load
that raises later has left the model unusable until another one is complete.

Holds for vLLM 0.25 to 0.32.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from asyncdapo.errors import WeightsError
from asyncdapo.model.tensor_names import read_shapes, weight_names
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.process_group import device_name
from asyncdapo.weights.ends import TRANSFER
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.staging import Staging

PROBE_ROWS = 256
"""Rows of the identity that are multiplied at once with a packed weight."""


@dataclass
class NoInit(WeightTransferInitInfo):
    """The group is made by `WorkerEnd.join_weights`, as often as need be, not by vLLM's own call."""


@dataclass
class StagedUpdate(WeightTransferUpdateInfo):
    """The version to load, which has been received before."""

    version: int


class StagedTransfer(WeightTransferEngine[NoInit, StagedUpdate]):
    """vLLM's seam for new weights: takes them from `staging`."""

    init_info_cls = NoInit
    update_info_cls = StagedUpdate

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.staging = Staging(device, vllm_config.parallel_config.tensor_parallel_size)

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing: see `NoInit`."""

    def start_weight_update(self) -> None:
        """Nothing, so that nothing has been begun that could fail between vLLM's calls."""

    def finish_weight_update(self) -> None:
        """Nothing, as before."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: StagedUpdate) -> None:
        """Load the staged version. Raises WeightsError with the model as it was when another one is staged, or when it
        isn't all of the model."""
        tensors = self.staging.take(update_info.version)
        self._refuse_unlike(tensors)
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)
            try:
                self.model.load_weights(tensors.items())
            finally:  # after an error too: the next load needs layers without half of this one
                finalize_layerwise_reload(self.model, self.model_config)
                self._renew_tied_heads()

    def _renew_tied_heads(self) -> None:
        """They got no tensor of their own, so vLLM has left alone what it had derived from the weight (on CPU a packed
        copy)."""
        for head in self._tied_heads:
            if method := getattr(head, "quant_method", None):
                method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self.staging.close()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Asked for by vLLM up to 0.27; the learner sends by `WeightSender`."""
        raise NotImplementedError

    def _refuse_unlike(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Everything that vLLM has read from the model's own files has to come anew, in the same shape."""
        for name, shape in self._shapes.items():
            if name not in tensors:
                raise WeightsError(f"{name} of the model is missing")
            if tuple(tensors[name].shape) != shape:
                raise WeightsError(f"{name} has shape {tuple(tensors[name].shape)}, the model needs {shape}")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights in the model's files, by their names."""
        shapes = read_shapes(Path(self.model_config.model))
        return {name: shapes[name] for name in weight_names(shapes, tied=bool(self._tied_heads))}

    @cached_property
    def _tied_heads(self) -> list[torch.nn.Module]:
        """First asked for before the first load, when the model is as vLLM has made it."""
        return _tied_heads(self.model)


class WorkerEnd:
    """Methods of vLLM's worker, for `ends.EngineEnd`."""

    def weights_device(self) -> str:
        """The name of the worker's device."""
        return device_name(self.device)

    def make_weights_room(self, manifest: bytes) -> None:
        """Begin to make room for these tensors."""
        self.weight_transfer_engine.staging.make_room(msgspec.msgpack.decode(manifest, type=Manifest))

    def join_weights(
        self, address: str, first_rank: int, world_size: int, backend: Backend, manifest: bytes, timeout_s: float
    ) -> int:
        """Begin to join. Returns this worker's rank in the group."""
        rank = first_rank + self.rank
        layout = msgspec.msgpack.decode(manifest, type=Manifest)
        self.weight_transfer_engine.staging.join(address, rank, world_size, backend, layout, timeout_s)
        return rank

    def receive_weights(self, version: int, branch: int) -> None:
        """Begin to receive."""
        self.weight_transfer_engine.staging.receive(version, branch)

    def weights_state(self) -> tuple[bool, str]:
        """Whether what was begun is over, and what it failed of."""
        try:
            return self.weight_transfer_engine.staging.settled(), ""
        except WeightsError as error:
            return True, str(error)

    def weights_memory(self) -> str:
        """Where the stream lands."""
        return self.weight_transfer_engine.staging.memory

    def weights_digest(self) -> str:
        """Of all parameters of the model, as they are multiplied with: equal where engines of the same shape hold equal
        weights, bit by bit."""
        digest = hashlib.sha256()
        with torch.inference_mode():
            for name, values in _values(self.weight_transfer_engine.model):
                digest.update(name.encode())
                digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def _tied_heads(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Output projections whose weight has another name, too: that of the embedding. The config doesn't say: vLLM unties
    a model whose files hold a head, and ties it again when the two are equal."""
    names = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    heads = [module for name, module in model.named_modules(remove_duplicate=False) if name.endswith("lm_head")]
    return [head for head in heads if names[id(getattr(head, "weight", None))] > 1]


def _values(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by its name. The CPU build keeps only packed copies of some: those are read by a product with
    the identity."""
    for name, module in model.named_modules():
        yield from module.named_parameters(name, recurse=False)
        weight = getattr(module, "weight", None)
        if weight is not None and weight.numel() == 0 and hasattr(module, "cpu_linear"):
            yield f"{name} packed", _unpacked(module)


def _unpacked(module: torch.nn.Module) -> torch.Tensor:
    size = module.input_size_per_partition
    identity = torch.eye(size, dtype=module.weight.dtype)
    rows = [module.cpu_linear(part, module.weight, None) for part in identity.split(PROBE_ROWS)]
    return torch.cat(rows)


WeightTransferEngineFactory.register_engine(TRANSFER, StagedTransfer)
