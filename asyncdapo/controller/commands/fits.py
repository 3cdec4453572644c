"""Room: whether what a plan puts on a GPU fits on one, by the formulas of `memory`. Pure.

In: the configuration, the shape of its model, the placement. Out: a line for each of the two common sizes of GPU, with
a reserve for what no formula knows (`memory.with_reserve`; vLLM measures what its processes need and keeps within its
share). Says nothing of a model's kinds without a formula.
"""

from __future__ import annotations

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.memory import GIB, GPU_GIB, engine_bytes, gib, learner_bytes, sequences_in, with_reserve
from asyncdapo.controller.fleet.placement import Bundle, Placement
from asyncdapo.model.shape import DTYPE_BYTES, Shape


def room_lines(config: Config, shape: Shape, placement: Placement) -> list[str]:
    """Empty where everything is on the CPU. The learner comes first, as elsewhere in a plan."""
    bundles = sorted((bundle for bundle in placement.bundles if bundle.num_gpus), key=_crowd)
    lines = []
    for size, capacity_gib in GPU_GIB.items():
        verdicts = {}
        for bundle in bundles:  # what holds where it is most crowded stands
            verdicts |= _verdicts(config, shape, placement, bundle, capacity_gib * GIB)
        if verdicts:
            lines.append(
                f"a GPU of {size} ({capacity_gib} GiB): {'; '.join(verdicts[role] for role in sorted(verdicts))}"
            )
    if any("doesn't fit: " in line for line in lines):
        lines.append(
            "every rank of the learner holds all weights and optimizer states: more ranks don't make it smaller"
        )
    return lines


def _verdicts(config: Config, shape: Shape, placement: Placement, bundle: Bundle, capacity: int) -> dict[str, str]:
    """Of each role on the GPUs of this bundle."""
    ranks, engines = ([name for name in bundle.processes if _role(name) == role] for role in ("learner", "rollout"))
    verdicts = {}
    left = capacity
    if engines and config.rollout.engine == "vllm":
        claim = placement.memory_fraction(engines[0], config.rollout.memory_fraction) * capacity
        room = sequences_in(shape, config, claim)
        verdicts["rollout"] = (
            f"an engine fits, with {min(room, config.rollout.slots)} of {config.rollout.slots} full-length sequences"
            if room > 0
            else f"an engine doesn't fit into its {gib(claim)}"
        )
        left -= len(engines) * (claim + DTYPE_BYTES[config.rollout.dtype] * shape.num_parameters)  # new ones arrive
    elif engines:
        needed = with_reserve(sum(engine_bytes(shape, config).values()))
        verdicts["rollout"] = "an engine fits" if needed <= left / len(engines) else "an engine doesn't fit"
        left -= len(engines) * needed
    if ranks:
        tensors = sum(learner_bytes(shape, config, on_gpu=True).values())
        needed, each = with_reserve(tensors), max(0, left / len(ranks))
        verdicts["learner"] = (
            "a rank of the learner fits"
            if needed <= each
            else f"a rank of the learner doesn't fit: it has {gib(each)} and takes {gib(needed)}, "
            f"of which {gib(needed - tensors)} are the reserve"
        )
    return verdicts


def _crowd(bundle: Bundle) -> tuple[int, int]:
    """Processes, and engines among them."""
    return len(bundle.processes), sum(_role(name) == "rollout" for name in bundle.processes)


def _role(process: str) -> str:
    return process.partition("-")[0]
