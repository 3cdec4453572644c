"""The weights' part in vLLM's worker processes: receive a version, and load it into the model.

vLLM imports this module in each of its workers because the engine names `WorkerReceiver` as a worker extension. The
import registers the transfer backend `TRANSFER`. The engine's process calls `WorkerReceiver` by RPC, with plain
arguments and answers. vLLM calls `StagedTransfer` between two tokens, while generation is paused.

In: the learner's stream, which the engine's first process receives into its `receive_buffer` while the model generates;
the others map that memory. Then the version to load. Out: the model computes with that version, in vLLM's own layout.
Invariant: a load is one call that loads every parameter or raises. A version with a missing tensor is refused before
anything is touched. A load that raises later leaves the model unusable until the next complete load.

Works with vLLM 0.25 to 0.32.
"""

# vLLM is an extra, and may not be installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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
from asyncdapo.model.files import ModelFiles
from asyncdapo.model.tensor_names import weight_names
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.shared_memory import device_name
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receive_buffer import ReceiveBuffer
from asyncdapo.weights.receivers import TRANSFER

RECEIVES = 0
"""The process of an engine that is in the weight group."""
PROBE_ROWS = 256
"""Rows of the identity matrix that are multiplied with a packed weight in one product."""


@dataclass
class NoInit(WeightTransferInitInfo):
    """Empty: vLLM's own call does nothing, since `WorkerReceiver.join_weights` joins every new group."""


@dataclass
class StagedUpdate(WeightTransferUpdateInfo):
    """The version to load. It has been received already."""

    version: int


class StagedTransfer(WeightTransferEngine[NoInit, StagedUpdate]):
    """vLLM's interface for new weights: takes them from `receive_buffer`."""

    init_info_cls = NoInit
    update_info_cls = StagedUpdate
    model: Any
    """vLLM's: a module that has `load_weights`."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receive_buffer = ReceiveBuffer(device, shared=vllm_config.parallel_config.world_size > 1)

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing: see `NoInit`."""

    def start_weight_update(self) -> None:
        """Nothing, so that no load is left half done if something fails between vLLM's calls."""

    def finish_weight_update(self) -> None:
        """Nothing: see `start_weight_update`."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: StagedUpdate) -> None:
        """Load the received version. Raises WeightsError, and leaves the model as it was, if another version was
        received or if a tensor is missing or misshapen."""
        tensors = self.receive_buffer.take(update_info.version)
        self._refuse_unlike(tensors)
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)
            try:
                self.model.load_weights(tensors.items())
            finally:  # also after an error: the next load must not find half of this one
                finalize_layerwise_reload(self.model, self.model_config)
                self._renew_tied_heads()

    def _renew_tied_heads(self) -> None:
        """Derive again what vLLM computes from a tied head's weight (on CPU a packed copy). The head has no tensor of
        its own, so vLLM doesn't do it."""
        for head in self._tied_heads:
            if method := getattr(head, "quant_method", None):
                method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self.receive_buffer.close()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM up to 0.27 requires this method. The learner sends with `WeightSender` instead."""
        raise NotImplementedError

    def _refuse_unlike(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Every tensor that vLLM read from the model's files must be here, in the same shape."""
        for name, shape in self._shapes.items():
            if name not in tensors:
                raise WeightsError(f"{name} of the model is missing")
            if tuple(tensors[name].shape) != shape:
                raise WeightsError(f"{name} has shape {tuple(tensors[name].shape)}, the model needs {shape}")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights in the model's files, by name."""
        tensors = ModelFiles(self.model_config.model).tensors
        return {name: tensors[name].shape for name in weight_names(tensors, tied=bool(self._tied_heads))}

    @cached_property
    def _tied_heads(self) -> list[torch.nn.Module]:
        """Computed before the first load, while the model is as vLLM made it."""
        return _tied_heads(self.model)


class WorkerReceiver:
    """Methods that vLLM's worker gets; `receivers.EngineReceiver` calls them. The attributes are the worker's."""

    device: torch.device
    rank: int
    weight_transfer_engine: StagedTransfer

    def weights_device(self) -> str:
        """The name of the worker's device."""
        return device_name(self.device)

    def make_weights_room(self, manifest: bytes) -> None:
        """Begin to allocate memory for these tensors."""
        if self.rank == RECEIVES:
            self.weight_transfer_engine.receive_buffer.make_room(msgspec.msgpack.decode(manifest, type=Manifest))

    def join_weights(
        self, address: str, rank: int, world_size: int, backend: Backend, manifest: bytes, timeout_s: float
    ) -> None:
        """Begin to join."""
        if self.rank == RECEIVES:
            layout = msgspec.msgpack.decode(manifest, type=Manifest)
            self.weight_transfer_engine.receive_buffer.join(address, rank, world_size, backend, layout, timeout_s)

    def weights_memory(self) -> tuple[str, bytes]:
        """Size and kind of the memory that receives the stream, and its handle."""
        buffer = self.weight_transfer_engine.receive_buffer
        return buffer.memory, buffer.handle

    def open_weights_memory(self, handle: bytes, manifest: bytes) -> None:
        """Map the memory of the process that receives."""
        if self.rank != RECEIVES:
            layout = msgspec.msgpack.decode(manifest, type=Manifest)
            self.weight_transfer_engine.receive_buffer.open(handle, layout)

    def receive_weights(self, version: int, branch: int) -> None:
        """Begin to receive."""
        if self.rank == RECEIVES:
            self.weight_transfer_engine.receive_buffer.receive(version, branch)

    def host_weights(self, host: str, backend: Backend, timeout_s: float) -> tuple[str, bytes]:
        """Open a group in which to send what was received. Returns its address, and what is sent."""
        if self.rank != RECEIVES:
            return "", b""
        address, layout = self.weight_transfer_engine.receive_buffer.host(host, backend, timeout_s)
        return address, msgspec.msgpack.encode(layout)

    def send_weights(self, version: int, branch: int, bucket_bytes: int) -> None:
        """Begin to send there."""
        if self.rank == RECEIVES:
            self.weight_transfer_engine.receive_buffer.send(version, branch, bucket_bytes)

    def abandon_weights(self) -> None:
        """Leave that group."""
        self.weight_transfer_engine.receive_buffer.abandon()

    def leave_weights(self) -> None:
        """Leave the group of the learner, too."""
        self.weight_transfer_engine.receive_buffer.leave()

    def weights_state(self) -> tuple[bool, str]:
        """Whether the operation is over, and why it failed; "" if it didn't."""
        try:
            return self.weight_transfer_engine.receive_buffer.settled(), ""
        except WeightsError as error:
            return True, str(error)

    def weights_digest(self) -> str:
        """Digest of all parameters of the model, as the products use them. Engines of the same shape have equal digests
        if their weights are equal bit by bit."""
        digest = hashlib.sha256()
        with torch.inference_mode():
            for name, values in _values(self.weight_transfer_engine.model):
                digest.update(name.encode())
                digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _tied_heads(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Output projections that share their weight with the embedding. The config doesn't tell: vLLM unties a model whose
    files hold a head, and ties it again if the two are equal."""
    names = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    heads = [module for name, module in model.named_modules(remove_duplicate=False) if name.endswith("lm_head")]
    return [head for head in heads if names[id(getattr(head, "weight", None))] > 1]


def _values(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by name. vLLM's CPU build keeps only a packed copy of some; a product with the identity matrix
    reads those."""
    for name, module in model.named_modules():
        yield from module.named_parameters(name, recurse=False)
        weight = getattr(module, "weight", None)
        if weight is not None and weight.numel() == 0 and hasattr(module, "cpu_linear"):
            yield f"{name} packed", _unpacked(module)


def _unpacked(module: Any) -> torch.Tensor:
    size = module.input_size_per_partition
    identity = torch.eye(size, dtype=module.weight.dtype)
    rows = [module.cpu_linear(part, module.weight, None) for part in identity.split(PROBE_ROWS)]
    return torch.cat(rows)


WeightTransferEngineFactory.register_engine(TRANSFER, StagedTransfer)
