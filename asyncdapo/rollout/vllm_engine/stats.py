"""What vLLM's scheduler says at each of its steps: how full its KV cache is, how many sequences it has preempted.

In: vLLM's records. Out: gauges of now. It takes the place of vLLM's own Prometheus logger, which a custom logger would
otherwise get beside it. What a release doesn't record isn't known. Does not own: what is made of the gauges
(`replay/server/pace`).
"""

# vLLM is an extra, and may not be installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import math
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger


class SchedulerStats(PrometheusStatLogger):
    """Of one engine."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Without the counters of the class above, which would be registered for the whole process."""
        self.kv_use = math.nan
        self.num_preemptions = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """One step of the scheduler."""
        if scheduler_stats is not None:
            self.kv_use = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.num_preemptions += iteration_stats.num_preempted_reqs

    def gauges(self) -> dict[str, float]:
        """`kv_use`: share of the KV cache; `preemptions` so far."""
        return {"kv_use": self.kv_use, "preemptions": self.num_preemptions}

    def log(self) -> None:
        """Nothing is printed."""

    def log_engine_initialized(self) -> None:
        """Nothing is printed."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Engines don't sleep here."""

    def record_admission_rejection(self, *_: Any, **__: Any) -> None:
        """Requests aren't rejected here."""
