"""Bottlenecks on purpose: engines and verifiers that are slow or say nothing, for runs whose verdict is known."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Mapping

import torch

from asyncdapo.reward.verifiers.answer import verify
from asyncdapo.rollout.engine import LoadTimes
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine

TOKEN_S, LOAD_S, VERDICT_S = 0.03, 2.0, 0.06
TAUGHT = 0.15
"""Share of the prompts on which answers differ in their verdict, for the two verifiers below."""


class SlowEngine(TorchEngine):
    """A token takes its time, however many sequences run: as on a GPU."""

    def _turn(self, *args, **kwargs) -> None:
        super()._turn(*args, **kwargs)
        time.sleep(TOKEN_S)


class PacedEngine(TorchEngine):
    """Slow enough that new weights come in the middle of most responses, and idle meanwhile."""

    def _turn(self, *args, **kwargs) -> None:
        super()._turn(*args, **kwargs)
        time.sleep(0.005)


class SlowToLoad(TorchEngine):
    """New weights take long to be in place."""

    async def load_weights(self, version: int, weights: Mapping[str, torch.Tensor]) -> LoadTimes:
        await asyncio.sleep(LOAD_S)
        return await super().load_weights(version, weights)


def is_right(response: str, answer: str) -> float:
    return 1.0 if verify(response, answer)["acc"] else 0.0


def slow_verdict(response: str, answer: str) -> float:
    time.sleep(VERDICT_S)
    return is_right(response, answer)


def _is_taught(answer: str) -> bool:
    return zlib.crc32(answer.encode()) % 100 < 100 * TAUGHT


def nearly_all_right(response: str, answer: str) -> float:
    return is_right(response, answer) if _is_taught(answer) else 1.0


def nearly_all_wrong(response: str, answer: str) -> float:
    return is_right(response, answer) if _is_taught(answer) else 0.0
