"""What `auto` stands for in dtypes and shards, settled when it is known who has a GPU.

    rollout.dtype: auto    bfloat16 where the engines are on GPUs, float32 on a CPU
    learner.dtype: auto    that of the engine where the learner is on a GPU, float32 on a CPU
    learner.shards: auto   the fewest that divide `learner.ranks` and fit a GPU of 80 GB by formula, whatever GPUs there
                           are, so that a plan and every launch choose alike; all ranks where no number fits, or where
                           the kind of model has no formula; 1 on a CPU

In: a configuration and the GPUs of each node. Out: the configuration without `auto`, which every process of a run gets,
its placement, and lines that say what it came to. RUN_DIR/config.yaml keeps `auto`, so that a run may be resumed on
another machine. Pure. Does not own: who lives where (`placement`), what a rank takes (`memory`), what an engine or a
learner does that is used alone (`shape.settled_dtype`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.memory import GIB, GPU_GIB, gib, host_bytes, learner_fits
from asyncdapo.controller.fleet.placement import Placement, learner_names, place
from asyncdapo.errors import ConfigError
from asyncdapo.model.shape import settled_dtype

COSTS = {
    "rollout": "its weights, its KV cache and what is sent to it take twice the memory of bfloat16",
    "learner": "no flash attention, and matrix products at 67 TFLOP/s instead of 989 (data sheet of an H100)",
}
"""Of float32 on a GPU."""
PLANNED_GPU = "80 GB"
"""The GPU that `learner.shards: auto` plans for: the smaller of the common sizes."""


def settle_placement(
    config: Config, gpus_of_nodes: Sequence[int], ranks: Sequence[str] | None = None
) -> tuple[Config, Placement]:
    """The configuration without `auto` in dtypes and shards, and where its processes live. See `place`."""
    placement = place(config, gpus_of_nodes, ranks)
    config = settle_dtypes(config, placement)
    if config.learner.shards != "auto":
        return config, placement
    config = _with_shards(config, _fewest_shards(config, placement))
    return config, place(config, gpus_of_nodes, ranks)


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


def shards_line(config: Config, placement: Placement | None) -> str:
    """How the learner's ranks divide the weights; with a placement, how many ranks are kept on one node."""
    num_shards, num_ranks = config.learner.num_shards, config.learner.ranks
    num_copies = num_ranks // num_shards
    line = f"{num_ranks} ranks have {'one copy' if num_copies == 1 else f'{num_copies} copies'} of the weights, "
    if num_shards == 1:
        return line + "each a whole one"
    line += f"divided among {num_shards} ranks{'' if num_copies == 1 else ' each'}"
    together = max((len(bundle.parts) for bundle in placement.with_gpus("learner")), default=1) if placement else 1
    return line + (f", {together} of them on one node" if together > 1 else "")


def check_host(config: Config, placement: Placement, num_bytes: int) -> None:
    """Raises ConfigError where `learner.offload` takes more memory than the only host has, which is `num_bytes`."""
    shape = config.model.files.shape
    if config.learner.offload == "none" or shape is None or not placement.on_gpus("learner"):
        return
    each = sum(host_bytes(shape, config).values())
    needed = config.learner.ranks * each
    if needed > num_bytes:
        problem = (
            f"takes {gib(needed)} GiB of this host's memory ({config.learner.ranks} x {gib(each)}, with the copy of a "
            f"checkpoint), which has {gib(num_bytes)}"
        )
        raise ConfigError("learner.offload", problem, config.learner.offload, "use none, or more learner.shards")


def _fewest_shards(config: Config, placement: Placement) -> int:
    shape, num_ranks = config.model.files.shape, config.learner.ranks
    if not placement.on_gpus("learner"):
        return 1
    if shape is None:
        return num_ranks
    fitting = (
        num_shards
        for num_shards in range(1, num_ranks)
        if num_ranks % num_shards == 0
        and learner_fits(_with_shards(config, num_shards), shape, placement, GPU_GIB[PLANNED_GPU] * GIB)
    )
    return next(fitting, num_ranks)


def _with_shards(config: Config, num_shards: int) -> Config:
    return replace(config, learner=replace(config.learner, shards=num_shards))
