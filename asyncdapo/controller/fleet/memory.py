"""Sizes: memory and work of a run by formula, from the shape in the model's config.json. Pure.

In: a shape, the configuration with dtypes and shards settled (`auto`), a placement. Out: bytes by what they are for, in
a learner's rank and in an engine; whether a rank fits; operations of a train step; the lines that say so. Of a learner
they are an upper bound at sequences of full length: torch.compile keeps less, and what is packed is shorter. What no
formula knows is in a reserve (`with_reserve`). On a CPU padding comes on top. Does not own: who lives where
(`placement`), the formulas of the shape itself (`shape`), how weights are sharded (`learner/model/sharding`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.placement import Bundle, Placement
from asyncdapo.model.shape import DTYPE_BYTES, FLOAT32_BYTES, TOKEN_BYTES, Shape

GIB = 1 << 30
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}
"""As `learner.logprobs` has them: most scores in one tensor, whatever the vocabulary and however many tokens."""
NUM_CHUNKS = 4
"""Such tensors at once, in float32."""
CHUNK_COLUMNS = 1 << 15
"""`learner.logprobs.COLUMNS`: the gradient of so many rows of the output layer is summed in float32 at a time."""
LOGPROB_BYTES = 5 * FLOAT32_BYTES
"""Of each token: four numbers behind its log-prob and entropy, and its id."""
GATHERED_BYTES = 16 << 20
"""As `learner.model.sharding` has it: smaller blocks, in float32, are gathered together with all else."""
GATHERED_BLOCKS = 2
"""One that computes, and the next one, which arrives."""
CHECKPOINT_BYTES = 3 * FLOAT32_BYTES
"""Of each parameter: the weight and two averages of AdamW."""
RESERVE_BYTES = 3 << 29
"""Of a process on a GPU, whatever the model: half a GiB for CUDA and its kernels, as much for NCCL's buffers, as much
for cuBLAS and small things. To be measured."""
RESERVE_SHARE = 0.05
"""Of what it holds by formula, besides: gaps in the allocator's memory, and in attention the keys of a prompt for each
of its responses. To be measured."""
FLOP_UNITS = {"G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
GPU_GIB = {"80 GB": 79, "141 GB": 139}
"""What a process finds on GPUs of the two common sizes (H100 and H200), by the size in their data sheets."""


# ------------------------------------------------------------------------------------------------------------- learner


def learner_bytes(shape: Shape, config: Config, *, on_gpu: bool) -> dict[str, int]:
    """Of each rank, where it computes, at the peak of a micro-batch's backward pass. `learner.shards` is a number."""
    learner = config.learner
    size = DTYPE_BYTES[learner.dtype]
    num_tokens = max(learner.tokens_per_microbatch, config.max_context)
    how = {"checkpointing": learner.activation_checkpointing, "flash": on_gpu and learner.dtype != "float32"}
    activations = num_tokens * (shape.kept_bytes(learner.dtype, **how) + shape.work_bytes(learner.dtype, **how))
    return {
        **({} if learner.offload == "optimizer" else state_bytes(shape, config)),
        f"gathered in {learner.dtype}": size * _num_gathered(shape, config),
        "gradients on their way": _gradient_bytes(shape, config, activations),
        f"activations of {num_tokens:,} tokens": activations,
        "log-probs": _logprob_bytes(shape, learner.dtype, num_tokens, "cuda" if on_gpu else "cpu"),
        "two buckets": 2 * (config.weights.bucket_mb << 20),
    }


def state_bytes(shape: Shape, config: Config) -> dict[str, int]:
    """What a rank keeps from step to step: its shard, in float32, and that of the reference model, rounded. With
    `learner.offload` it is in memory of the host."""
    num_parameters = math.ceil(shape.num_parameters / config.learner.num_shards)
    shard, rounded = (DTYPE_BYTES[dtype] * num_parameters for dtype in ("float32", config.learner.dtype))
    reference = {"the reference model": rounded} if config.loss.kl_coef else {}
    return {"weights": shard, "gradients": shard, "AdamW": 2 * shard, **reference}


def host_bytes(shape: Shape, config: Config) -> dict[str, int]:
    """Of each rank in memory of the host, wherever it computes, but for what a process takes anyway: what
    `learner.offload` keeps there, and its part of a checkpoint, from the copy until it is written: replicas share it
    out by whole tensors, so of a rank it is the mean."""
    copied = math.ceil(CHECKPOINT_BYTES * shape.num_parameters / config.learner.ranks)
    kept = state_bytes(shape, config) if config.learner.offload == "optimizer" else {}
    return {**kept, "the copy of a checkpoint": copied}


def _num_gathered(shape: Shape, config: Config) -> int:
    """Parameters that are whole at a rank while it computes: those outside the blocks all the time, of the blocks those
    of a few, or all that a forward pass has left for the backward pass."""
    if _are_one_group(shape) or not config.learner.reshard_after_forward:
        return shape.num_parameters
    return shape.num_root_parameters + min(GATHERED_BLOCKS, shape.num_layers) * shape.num_block_parameters


def _are_one_group(shape: Shape) -> bool:
    """Whether the blocks are so small that they are gathered, and their gradients summed, with all else."""
    return FLOAT32_BYTES * shape.num_block_parameters < GATHERED_BYTES


def _gradient_bytes(shape: Shape, config: Config, activations: int) -> int:
    """Gradients that aren't divided yet: of a block as the backward pass makes them, and of the block before it in
    float32, as they are summed over ranks; where there is one shard, PyTorch copies these once more instead. Those
    outside the blocks, and of small blocks, come last, when activations are free again."""
    size = DTYPE_BYTES[config.learner.dtype]
    summed = FLOAT32_BYTES + (size if config.learner.num_shards > 1 else FLOAT32_BYTES)
    if _are_one_group(shape):
        return max(size * shape.num_parameters, summed * shape.num_parameters - activations)
    return max(summed * shape.num_block_parameters, summed * shape.num_root_parameters - activations)


def with_reserve(num_bytes: int) -> int:
    """What a process needs of a GPU whose tensors take so many bytes."""
    return num_bytes + RESERVE_BYTES + int(RESERVE_SHARE * num_bytes)


def _logprob_bytes(shape: Shape, dtype: str, num_tokens: int, device: str) -> int:
    """The only part but for the weights that the vocabulary is in: the gradient of the output layer, which for tied
    embeddings waits for that of the first one. Hidden states are there once more, as many as bear loss."""
    of_a_token = DTYPE_BYTES[dtype] * shape.hidden_size + LOGPROB_BYTES + TOKEN_BYTES
    gradient = DTYPE_BYTES[dtype] * shape.vocab_size * shape.hidden_size
    summed = 2 * FLOAT32_BYTES * CHUNK_COLUMNS * shape.hidden_size  # a sum, and a product that is added to it
    return num_tokens * of_a_token + gradient + summed + NUM_CHUNKS * FLOAT32_BYTES * CHUNK_ELEMENTS[device]


def step_flops(shape: Shape, config: Config) -> int:
    """At most so many in the forward and backward passes of a train step: every completion as long as it may be, no
    prompt shared. Passes without gradient, which some losses need, come on top."""
    num_completions = config.replay.prompts_per_step * config.rollout.group_size
    longest, num_logits = config.max_context, config.rollout.max_response_length
    num_pairs = longest * (longest + 1) // 2
    return config.learner.epochs * num_completions * shape.train_flops(longest, num_logits, num_pairs)


def learner_forecast(shape: Shape, config: Config, *, on_gpu: bool) -> list[str]:
    """What is said of the learner before it starts, to be held against `learner/peak_gib` and `learner/tflops`."""
    parts = learner_bytes(shape, config, on_gpu=on_gpu)
    return [
        f"learner: at most {gib(sum(parts.values()))} GiB a rank by formula ({listed(parts)})",
        f"learner: at most {flop(step_flops(shape, config))} a step",
    ]


def learner_measured(forecast_bytes: int, metrics: Mapping[str, float]) -> str:
    """One line on a step's metrics, for whoever read the forecast."""
    line = f"learner: {metrics['learner/peak_gib']:.3g} GiB at its peak so far, {gib(forecast_bytes)} by formula"
    if "learner/tflops" in metrics:
        line += f"; {flop(metrics['learner/tflops'] * 1e12)} a second"
    if "learner/mfu" in metrics:
        line += f", {metrics['learner/mfu']:.0%} of what the hardware has at most"
    return line


# -------------------------------------------------------------------------------------------------------------- engine


def sequences_in(shape: Shape, config: Config, num_bytes: float) -> int:
    """How many full-length sequences an engine has room for in all, where it may take `num_bytes` of each of its GPUs;
    negative where its weights alone are more. New weights then arrive in memory of the host."""
    rollout = config.rollout
    left = rollout.tensor_parallel * num_bytes - DTYPE_BYTES[rollout.dtype] * shape.num_parameters
    return math.floor(left / (config.max_context * shape.kv_bytes(rollout.dtype)))


def engine_bytes(shape: Shape, config: Config) -> dict[str, int]:
    """Of each engine, over all of its GPUs, with a full-length sequence in every slot. vLLM may have less for the KV
    cache: then sequences wait. New weights arrive once: those of an engine on several GPUs in memory of the host, those
    of another one there if its GPU has no room."""
    rollout = config.rollout
    weights = DTYPE_BYTES[rollout.dtype] * shape.num_parameters
    longest = config.max_context
    cache = rollout.slots * longest * shape.kv_bytes(rollout.dtype)
    return {
        "weights": weights,
        f"KV cache of {rollout.slots} x {longest:,} tokens": cache,
        "new weights as they arrive" + ", on the host" * (rollout.tensor_parallel > 1): weights,
    }


# ---------------------------------------------------------------------------------------------------------------- room


def learner_fits(config: Config, shape: Shape, placement: Placement, capacity: int) -> bool:
    """Whether every rank of the learner fits GPUs of so many bytes."""
    needed = with_reserve(sum(learner_bytes(shape, config, on_gpu=True).values()))
    room = (left_for_rank(config, shape, bundle, placement, capacity) for bundle in placement.with_gpus("learner"))
    return all(needed <= left for left in room)


def left_for_rank(config: Config, shape: Shape, bundle: Bundle, placement: Placement, capacity: int) -> float:
    """Bytes of a GPU of this bundle that each of its ranks may take; negative where its engines take more."""
    left, engines = float(capacity), bundle.of_role("rollout")
    for engine in engines:
        if config.rollout.engine == "vllm":
            claim = placement.memory_fraction(engine, config.rollout.memory_fraction) * capacity
            left -= claim + DTYPE_BYTES[config.rollout.dtype] * shape.num_parameters  # new ones arrive
        else:
            left -= with_reserve(sum(engine_bytes(shape, config).values()))
    return left / len(bundle.of_role("learner")) if bundle.shares_gpu else left


# --------------------------------------------------------------------------------------------------------------- words


def gib(num_bytes: float) -> str:
    """To three digits, without an exponent."""
    return f"{num_bytes / GIB:.3g}" if num_bytes < 999.5 * GIB else f"{num_bytes / GIB:,.0f}"


def listed(parts: dict[str, int]) -> str:
    """Bytes by what they are for, in GiB."""
    return ", ".join(f"{what} {gib(num_bytes)}" for what, num_bytes in parts.items())


def flop(number: float) -> str:
    """Floating point operations to three digits, in the unit that leaves at most three before the point."""
    for prefix, scale in FLOP_UNITS.items():
        if number < 999.5 * scale:
            return f"{number / scale:.3g} {prefix}FLOP"
    return f"{number / scale:,.0f} {prefix}FLOP"
