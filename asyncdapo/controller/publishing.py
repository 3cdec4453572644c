"""Publishing: brings the learner's weights to every rollout worker, and mends the process group when that fails.

In: `publish(version)` after a train step. Out: the workers generate with that version; `weights/…` metrics. A transfer
that fails leaves the old weights in use everywhere; the group is then made anew and the same version sent again, up to
`weights.max_missed` times, after which the run ends. Nothing here touches a tensor: the controller only tells both
ends when.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from asyncdapo.errors import RunError, WeightsError
from asyncdapo.weights.backend import choose_backend
from asyncdapo.weights.config import WeightsConfig

log = logging.getLogger("weights")

COMMAND_MARGIN_S = 10.0
"""What a command may take beyond the transfer's own timeout before it counts as failed."""


class Publishing:
    """One learner, one to many workers, one process group at a time."""

    def __init__(self, config: WeightsConfig, learner: Any, workers: list[Any]) -> None:
        self.config, self.learner, self.workers = config, learner, workers

    async def connect(self) -> None:
        """Make the process group: the learner is rank 0 and hosts the store, worker i is rank i + 1."""
        ends = {"learner": self.learner} | {f"rollout {i}": worker for i, worker in enumerate(self.workers)}
        devices = {name: await actor.device.remote() for name, actor in ends.items()}
        backend, reason = choose_backend(self.config, devices)
        log.info("weights travel by %s: %s", backend, reason)
        address, manifest = await self.learner.host_weights.remote(len(ends), backend)
        joins = [
            worker.join_weights.remote(address, rank, len(ends), backend, manifest)
            for rank, worker in enumerate(self.workers, start=1)
        ]
        await self._within_deadline("make the weight group", self.learner.accept_workers.remote(), *joins)

    async def publish(self, version: int) -> dict[str, float]:
        """Send `version` to every worker; returns when all of them generate with it."""
        for attempt in range(1, self.config.max_missed + 1):
            try:
                return await self._send(version)
            except WeightsError as error:
                log.warning("version %d did not arrive (attempt %d): %s", version, attempt, error)
                missed = error
                await self.connect()
        raise RunError(
            f"version {version} did not reach the workers in weights.max_missed ({self.config.max_missed}) "
            f"attempts: {missed}"
        )

    async def _send(self, version: int) -> dict[str, float]:
        receives = [worker.receive_weights.remote(version) for worker in self.workers]
        sent, *received = await self._within_deadline(
            f"send version {version}", self.learner.send_weights.remote(version), *receives
        )
        return {
            "weights/publish_s": sent["seconds"],
            "weights/bytes": sent["bytes"],
            "weights/load_s": max(report["load_s"] for report in received),
        }

    async def _within_deadline(self, what: str, *calls: Any) -> list[Any]:
        """All calls, each to its end, so that none is left behind; then the first failure, if there is one."""
        deadline_s = self.config.timeout_s + COMMAND_MARGIN_S
        tasks = [asyncio.ensure_future(_call(call)) for call in calls]
        _, pending = await asyncio.wait(tasks, timeout=deadline_s)
        if pending:
            for task in pending:
                task.cancel()
            raise WeightsError(f"{what}: {len(pending)} of {len(tasks)} ends gave no answer in {deadline_s:g} s")
        return [task.result() for task in tasks]


async def _call(call: Any) -> Any:
    return await call
