"""Number formats: what engine and learner compute in, settled when it is known who has a GPU.

    rollout.dtype: auto    bfloat16 where the engines are on GPUs, float32 on a CPU
    learner.dtype: auto    that of the engine where the learner is on a GPU, float32 on a CPU

In: a configuration and its placement. Out: the configuration without `auto`, which every process of a run gets, and
lines that say what it came to. RUN_DIR/config.yaml keeps `auto`, so that a run may resume on another machine. Pure.
Does not own: who lives where (`placement`), the dtype of an engine or a learner used alone (`shape.settled_dtype`).
"""

from __future__ import annotations

from dataclasses import replace

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.placement import Placement, learner_names
from asyncdapo.model.shape import settled_dtype

COSTS = {
    "rollout": "its weights, its KV cache and what is sent to it take twice the memory of bfloat16",
    "learner": "no flash attention, and matrix products at 67 TFLOP/s instead of 989 (data sheet of an H100)",
}
"""Of float32 on a GPU."""


def settle_dtypes(config: Config, placement: Placement) -> Config:
    """The configuration with the number formats that `auto` stands for in this placement."""
    engine = settled_dtype(config.rollout.dtype, on_gpu=placement.on_gpus("rollout"))
    follows = config.learner.dtype == "auto" and placement.on_gpus("learner")
    learner = engine if follows else settled_dtype(config.learner.dtype, on_gpu=False)
    return replace(
        config, rollout=replace(config.rollout, dtype=engine), learner=replace(config.learner, dtype=learner)
    )


def dtype_lines(config: Config, placement: Placement) -> list[str]:
    """What `config`, whose `auto` isn't settled, comes to; a further line for each role that pays for float32 on a GPU.
    `placement` may be one without a learner."""
    settled = settle_dtypes(config, placement)
    has_learner = any(learner_names(config)[0] in bundle.processes for bundle in placement.bundles)
    parts, costs = [], []
    for role in ("rollout", "learner") if has_learner else ("rollout",):
        asked, dtype = getattr(config, role).dtype, getattr(settled, role).dtype
        has_gpu = placement.on_gpus(role)
        why = f" ({asked}, on a {'GPU' if has_gpu else 'CPU'})" if asked != dtype else ""
        parts.append(f"{role}.dtype {dtype}{why}")
        if has_gpu and dtype == "float32":
            turn = "rollout" if asked == "auto" and placement.on_gpus("rollout") else role
            costs.append(f"{role}.dtype float32 on a GPU: {COSTS[role]}; {turn}.dtype=bfloat16 avoids it")
    return [", ".join(parts), *costs]
