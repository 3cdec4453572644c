"""A weight transfer for tests: a version is a safetensors file in the directory that `WEIGHTS_VARIABLE` names.

Runs in the engine's processes; importing it there registers it with vLLM.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from .models import TRANSFER, WEIGHTS_VARIABLE


@dataclass
class FileInit(WeightTransferInitInfo):
    pass


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    version: int


class FileTransfer(WeightTransferEngine[FileInit, FileUpdate]):
    init_info_cls, update_info_cls = FileInit, FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FileUpdate) -> None:
        """A version without a file fails after the model was taken apart: the load is half done."""
        path = Path(os.environ[WEIGHTS_VARIABLE]) / f"{update_info.version}.safetensors"
        self.model.load_weights(load_file(path).items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: object, trainer_args: object) -> None:
        """Abstract in some releases of vLLM."""


class Worker:
    """Mixed into vLLM's worker."""

    def process_id(self) -> int:
        return os.getpid()

    def num_threads(self) -> int:
        return torch.get_num_threads()

    def fail(self, what: str) -> None:
        raise ValueError(what)


if TRANSFER not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER, FileTransfer)
