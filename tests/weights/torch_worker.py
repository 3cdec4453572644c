"""A torch engine that always generates, and its receiver, in a process of their own (`members.Member`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from threading import Thread
from typing import Any

import torch

from asyncdapo.rollout.engine import Sample
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine
from asyncdapo.transport.backend import HOST_ID, Backend
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receivers import LocalReceiver
from tests.rollout.torch_engine.models import engine_for, request
from tests.weights.members import Print, fingerprint

RESPONSE_LENGTH = 200


class TorchWorker:
    """The actions."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine: TorchEngine | None = None
        self.end: LocalReceiver | None = None

    def begin(self, model: str, timeout_s: float, host: str) -> None:
        """Load the model and generate from now on, as if on this host."""
        os.environ[HOST_ID] = host
        self.engine = engine_for(model, max_response_length=RESPONSE_LENGTH)
        self.end = LocalReceiver(lambda: torch.device("cpu"), timeout_s)
        self._wait(self.engine.start())
        asyncio.run_coroutine_threadsafe(self._generate(), self.loop)

    async def _generate(self) -> None:
        while True:
            await self.engine.generate(request(9, range(4), max_tokens=RESPONSE_LENGTH))

    def join(self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        self._wait(self.end.join(address, rank, world_size, backend, manifest))

    def receive(self, version: int) -> Print:
        """Receive this version and load it. Returns what arrived."""
        arrived = self._wait(self.end.receive(version, 0))
        print_ = fingerprint(arrived)
        self._wait(self.engine.load_weights(version, arrived))
        return print_

    def num_tokens(self) -> float:
        """Sampled so far."""
        return self.engine.gauges()["tokens"]

    def sample(self) -> list[Sample]:
        return self._wait(self.engine.generate(request(12, [1, 2], max_tokens=40)))

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()
