"""Costs: the GPU-seconds of workers and learner so far, and what each class of tokens took of a run's seconds.

In: where processes live, which are up, the counts of replay and workers in a step. Out: metrics. A GPU is held as long
as its process is up, whatever it does; one that several processes share is dealt to them in equal parts. A class of
tokens took as much as its share of all tokens: what a token costs doesn't depend on what becomes of it. Pure but for
the clock. Does not own: processor time (each process its own), classes of tokens (`replay/server/accounts`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from asyncdapo.controller.fleet.placement import Placement
from asyncdapo.replay.server.accounts import TOKEN_ENDS, WORKERS_ENDS

CLASSES = (*TOKEN_ENDS, *WORKERS_ENDS, "held", "partial", "in_flight")
GPU_S = {"rollout": "rollout/gpu_s", "learner": "learner/gpu_s"}
"""By role."""


class Costs:
    """Of one launch."""

    def __init__(
        self, placement: Placement, last_line: Mapping[str, float], now: Callable[[], float] = time.monotonic
    ) -> None:
        """`last_line`: of the launch before; empty for a new run."""
        self._placement = placement
        self._gpu_s = {name: last_line.get(name, 0.0) for name in GPU_S.values()}
        self._now, self._since_s = now, now()

    def metrics(self, replay: Mapping[str, float], processes: Iterable[str]) -> dict[str, float]:
        """Up to now. `replay`: what the replay server says of a step. `processes`: workers and ranks that are up, as
        they have been since the step before."""
        since_s, self._since_s = self._since_s, self._now()
        for process in processes:
            held_s = self._placement.num_gpus_of(process) * (self._since_s - since_s)
            self._gpu_s[GPU_S[process.partition("-")[0]]] += held_s
        tokens = {each: max(0.0, replay[f"replay/tokens_{each}"]) for each in CLASSES}
        whole, gpu_s = sum(tokens.values()) or 1.0, self._gpu_s["rollout/gpu_s"]
        of_cpu = {f"rollout/cpu_s_{each}": replay["rollout/cpu_s"] * part / whole for each, part in tokens.items()}
        of_gpu = {f"rollout/gpu_s_{each}": gpu_s * part / whole for each, part in tokens.items()}
        return self._gpu_s | of_cpu | (of_gpu if gpu_s else {})
