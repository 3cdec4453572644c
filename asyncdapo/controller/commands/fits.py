"""Room: whether what a plan puts on a GPU fits on one, by the formulas of `memory`. Pure.

In: the configuration, the shape of its model, the placement. Out: a line for each of the two common sizes of GPU, with
a reserve for what no formula knows (`memory.with_reserve`; vLLM measures what its processes need and keeps within its
share); where a rank of the learner doesn't fit, a line with the keys that make it smaller. Says nothing of a model's
kinds without a formula.
"""

from __future__ import annotations

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.memory import (
    GIB,
    GPU_GIB,
    engine_bytes,
    gib,
    learner_bytes,
    learner_fits,
    left_for_rank,
    sequences_in,
    with_reserve,
)
from asyncdapo.controller.fleet.placement import Bundle, Placement
from asyncdapo.model.shape import Shape


def room_lines(config: Config, shape: Shape, placement: Placement) -> list[str]:
    """Empty where everything is on the CPU. The learner comes first, as elsewhere in a plan."""
    bundles = sorted((bundle for bundle in placement.bundles if bundle.num_gpus), key=_crowd)
    lines, fits = [], True
    for size, capacity_gib in GPU_GIB.items():
        capacity, verdicts = capacity_gib * GIB, {}
        for bundle in bundles:  # what holds where it is most crowded stands
            verdicts |= _verdicts(config, shape, placement, bundle, capacity)
        if verdicts:
            said = "; ".join(verdicts[role] for role in sorted(verdicts))
            lines.append(f"a GPU of {size} ({capacity_gib} GiB): {said}")
        fits &= learner_fits(config, shape, placement, capacity)
    return lines if fits else [*lines, f"smaller: {', '.join(_remedies(config))}"]


def _remedies(config: Config) -> list[str]:
    """What makes a rank of the learner smaller, as far as it isn't in force."""
    learner = config.learner
    remedies = {
        "learner.reshard_after_forward=true": not learner.reshard_after_forward,
        "learner.activation_checkpointing=full": learner.activation_checkpointing != "full",
        f"learner.shards={learner.ranks}": learner.num_shards < learner.ranks,
        "more learner.ranks": learner.offload == "none",
        "learner.offload=optimizer": learner.offload == "none",
        "a lower rollout.max_response_length": True,
    }
    return [text for text, helps in remedies.items() if helps]


def _verdicts(config: Config, shape: Shape, placement: Placement, bundle: Bundle, capacity: int) -> dict[str, str]:
    """Of each role on the GPUs of this bundle."""
    ranks, engines = bundle.of_role("learner"), bundle.of_role("rollout")
    verdicts = {}
    if engines and config.rollout.engine == "vllm":
        claim = placement.memory_fraction(engines[0], config.rollout.memory_fraction) * capacity
        room = sequences_in(shape, config, claim)
        verdicts["rollout"] = (
            f"an engine fits, with {min(room, config.rollout.slots)} of {config.rollout.slots} full-length sequences"
            if room > 0
            else f"an engine doesn't fit into its {gib(claim)}"
        )
    elif engines:
        needed = with_reserve(sum(engine_bytes(shape, config).values()))
        verdicts["rollout"] = "an engine fits" if needed <= capacity / len(engines) else "an engine doesn't fit"
    if ranks:
        tensors = sum(learner_bytes(shape, config, on_gpu=True).values())
        needed, each = with_reserve(tensors), max(0, left_for_rank(config, shape, bundle, placement, capacity))
        verdicts["learner"] = (
            f"a rank of the learner fits: it takes {gib(needed)} of {gib(each)}, of which {gib(needed - tensors)} are "
            "the reserve"
            if needed <= each
            else f"a rank of the learner doesn't fit: it has {gib(each)} and takes {gib(needed)}, "
            f"of which {gib(needed - tensors)} are the reserve"
        )
    return verdicts


def _crowd(bundle: Bundle) -> tuple[float, int]:
    """Processes on a GPU, and engines among them."""
    return len(bundle.processes) / bundle.num_gpus, len(bundle.of_role("rollout"))
