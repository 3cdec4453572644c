"""The checks of the GPU hour, the most valuable first. Imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@dataclass(frozen=True)
class Check:
    """A module of this folder, in a process of its own."""

    name: str
    module: str
    about: str
    usual_s: int
    """Expected duration on a GPU; with less time left the check isn't started."""
    limit_s: int
    """After this time it is ended."""
    args: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    env: dict[str, str] = field(default_factory=dict)


BASE = ("msgspec", "omegaconf", "zmq", "safetensors", "transformers")
VLLM = (*BASE, "vllm")
RAY = (*VLLM, "ray")
TESTS = (*BASE, "pytest", "pytest_timeout")
GPU_TESTS = "tests/learner/test_gpu.py tests/weights/test_gpu.py"

CHECKS = (
    Check("environment", "environment", "versions, compilers, rates of products and copies", 30, 120),
    Check("gradient", "gradient", "the learner's gradient against float64", 60, 180, (), BASE),
    Check("gpu_tests", "gpu_tests", "the tests that need a GPU", 90, 240, ("--files", GPU_TESTS), TESTS),
    Check("parity", "parity", "vLLM's log-probs against the learner's, over an update in flight", 120, 300, (), VLLM),
    Check("attention", "attention", "kernels of attention: how far from float64, how fast", 30, 120, (), BASE),
    Check("head", "head", "chunks of the output layer: time and memory", 30, 120, (), BASE),
    Check("mfu_0.5b", "mfu", "bench learner, 0.5B", 120, 300, ("--shape", "qwen2.5-0.5b"), BASE),
    Check("weights_ipc", "weights", "two engines, weights in flight by IPC", 120, 300, ("--backend", "ipc"), VLLM),
    Check("weights_nccl", "weights", "the same by NCCL", 120, 300, ("--backend", "nccl"), VLLM),
    Check("whole_run", "whole_run", "launch quickstart on a shared GPU, 0.5B shape", 180, 400, (), RAY),
    Check("memory", "memory", "peak memory against the formula", 60, 240, (), BASE),
    Check("memory_expandable", "memory", "the same with expandable segments", 60, 240, (), BASE, EXPANDABLE),
    Check(
        "gpu_tests_expandable",
        "gpu_tests",
        "weights between processes with expandable segments",
        60,
        180,
        ("--files", "tests/weights/test_gpu.py"),
        TESTS,
        EXPANDABLE,
    ),
    Check("restart", "whole_run", "the same run, its engine killed", 200, 400, ("--kill", "engine"), RAY),
    Check("mfu_1.5b", "mfu", "bench learner, 1.5B", 180, 400, ("--shape", "qwen2.5-1.5b"), BASE),
)
