"""Publishing: brings the learner's weights to every rollout worker, and mends the process group when that fails.

In: `publish(version)` after a train step. Out: the workers generate with that version; `weights/…` metrics. A transfer
that fails leaves the old weights in use everywhere; the group is then made anew and the same version sent again, up to
`weights.max_missed` times, after which the run ends. Nothing here touches a tensor: the controller only tells both
ends when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from functools import partial
from typing import Any

from asyncdapo.controller.processes import Process
from asyncdapo.errors import RunError, WeightsError
from asyncdapo.weights.backend import choose_backend
from asyncdapo.weights.config import WeightsConfig

log = logging.getLogger("weights")

COMMAND_MARGIN_S = 10.0
"""What a command may take beyond the transfer's own timeout before it counts as failed."""


class Publishing:
    """One learner, one to many workers, one process group at a time."""

    def __init__(self, config: WeightsConfig, learner: Process, workers: list[Process]) -> None:
        self.config, self.learner, self.workers = config, learner, workers

    async def connect(self) -> None:
        """Make the process group: the learner is rank 0 and hosts the store, worker i is rank i + 1."""
        ends = [self.learner, *self.workers]
        within = partial(self._within_deadline, "make the weight group")
        devices = await within(*(process.call("device") for process in ends))
        backend, reason = choose_backend(self.config, dict(zip((end.name for end in ends), devices, strict=True)))
        log.info("weights travel by %s: %s", backend, reason)
        ((address, manifest),) = await within(self.learner.call("host_weights", len(ends), backend))
        joins = (
            worker.call("join_weights", address, rank, len(ends), backend, manifest)
            for rank, worker in enumerate(self.workers, start=1)
        )
        await within(self.learner.call("accept_workers"), *joins)

    async def publish(self, version: int) -> dict[str, float]:
        """Send `version` to every worker; returns when all of them generate with it."""
        missed: WeightsError | None = None
        for _ in range(self.config.max_missed):
            try:
                if missed:
                    await self.connect()
                return await self._send(version)
            except WeightsError as error:
                log.warning("version %d did not arrive: %s", version, error)
                missed = error
        raise RunError(
            f"version {version} did not arrive {self.config.max_missed} times (weights.max_missed): {missed}"
        )

    async def _send(self, version: int) -> dict[str, float]:
        sent, *received = await self._within_deadline(
            f"send version {version}",
            self.learner.call("send_weights", version),
            *(worker.call("receive_weights", version) for worker in self.workers),
        )
        return {
            "weights/publish_s": sent["seconds"],
            "weights/bytes": sent["bytes"],
            "weights/load_s": max(report["load_s"] for report in received),
        }

    async def _within_deadline(self, what: str, *calls: Coroutine[Any, Any, Any]) -> list[Any]:
        """All answers, each call waited for to its end, so that none is left behind; then the first error is raised."""
        deadline_s = self.config.timeout_s + COMMAND_MARGIN_S
        tasks = [asyncio.ensure_future(call) for call in calls]
        _, pending = await asyncio.wait(tasks, timeout=deadline_s)
        for task in pending:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, asyncio.CancelledError):
                raise answer
        if pending:
            raise WeightsError(f"{what}: {len(pending)} of {len(tasks)} ends gave no answer in {deadline_s:g} s")
        return answers
