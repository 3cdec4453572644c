"""An actor that knows which GPUs it was given. Alone in its file, since each process that hosts one imports it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from asyncdapo.controller.roles.base import ProcessSpec


class Sighted:
    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec

    async def call(self, pick: Callable[[Sighted], Callable[[], Awaitable[str]]]) -> str:
        return await pick(self)()

    async def gpus(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")
