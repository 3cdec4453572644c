"""Peak memory of the learner's step against the formula (`controller.sizes`), and what a plan's reserve is for.

    allocated    memory of tensors at their peak: the formula is its upper bound
    reserved     memory of torch's allocator: the difference is fragmentation
    others       other used memory of the GPU: CUDA's context, kernels, libraries

Run once with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True and once without. Without a GPU the growth of the
process's memory replaces `allocated`, and isn't checked.
"""

from __future__ import annotations

import gc
import resource
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from asyncdapo.config.config import config_from_dict
from asyncdapo.controller.fleet.memory import learner_bytes, with_reserve
from asyncdapo.model.shape import read_shape
from benchmarks.gpu_hour.check import Figures, hold, main
from benchmarks.gpu_hour.models import SMALL, made
from benchmarks.learner_step import batch
from benchmarks.learner_step.lengths import draw_lengths
from benchmarks.learner_step.shapes import SHAPES
from benchmarks.learner_step.worker import OurStep

GIB = 1 << 30
CASES = (
    ("qwen2.5-0.5b", "none", 16384),
    ("qwen2.5-0.5b", "full", 65536),
    ("qwen2.5-1.5b", "none", 16384),
    ("qwen2.5-1.5b", "selective", 32768),
)
"""Shape, checkpointing, tokens of a micro-batch."""
LENGTH, NUM_STEPS = 2048, 3


def measure(figures: Figures, args: Namespace) -> None:
    rows = {}
    for name, checkpointing, num_tokens in (("small", "none", 512),) if args.cpu else CASES:
        shape, length = (SMALL, 64) if args.cpu else (SHAPES[name], LENGTH)
        rows[f"{name} {checkpointing} {num_tokens}"] = _row(shape, checkpointing, num_tokens, length, args.cpu)
        figures.add(rows=rows)
    said = (f"{name}: formula {row['formula']}, {row['allocated']} of {row['reserved']}" for name, row in rows.items())
    figures.add(summary="GiB: " + "; ".join(said))
    for name, row in rows.items():
        hold(args.cpu or row["allocated"] <= row["formula"], f"{name}: more than by formula: {row}")
        hold(args.cpu or row["used"] <= row["with_reserve"], f"{name}: more than formula and reserve: {row}")


def _row(shape: dict, checkpointing: str, num_tokens: int, length: int, cpu: bool) -> dict[str, float]:
    """GiB."""
    device, dtype = ("cpu", "float32") if cpu else ("cuda", "bfloat16")
    settings = {"activation_checkpointing": checkpointing, "tokens_per_microbatch": num_tokens}
    lengths = {"prompts": {"max_prompt_length": length // 4}, "rollout": {"max_response_length": length - length // 4}}
    config = config_from_dict({"model": {"path": "none"}, **lengths, "learner": {**settings, "dtype": dtype}})
    formula = sum(learner_bytes(read_shape(shape), config, on_gpu=not cpu).values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    with tempfile.TemporaryDirectory() as folder:
        file = batch.make(draw_lengths(f"fixed:{length}", 2, 2 * num_tokens // length, seed=0), shape["vocab_size"], 0)
        spec = {"model": str(made(shape, Path(folder) / "model")), "device": device, "dtype": dtype, "lr": 1e-6}
        spec |= {"threads": 1, "compile": False, "shared": True, "tokens_per_microbatch": num_tokens}
        if not cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = OurStep({**spec, "checkpointing": checkpointing}, file)
        for _ in range(NUM_STEPS):
            step()
    if cpu:
        allocated = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        found = {"allocated": allocated, "reserved": allocated, "used": allocated}
    else:
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        reserved = torch.cuda.max_memory_reserved()
        found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": reserved}
        found |= {"others": others, "used": reserved + others}
    del step
    gc.collect()
    found |= {"formula": formula, "with_reserve": with_reserve(formula)}
    return {name: round(value / GIB, 3) for name, value in found.items()}


if __name__ == "__main__":
    main(measure)
