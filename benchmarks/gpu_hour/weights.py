"""Weights in flight: two vLLM engines under load, and versions that arrive meanwhile (`weights_in_flight.py`).

It fails unless all engines' weights are equal, bit by bit, after every version, and different from before it. On a GPU
vLLM replays CUDA graphs and schedules ahead. Without a GPU Gloo replaces NCCL.
"""

from __future__ import annotations

from argparse import Namespace

from benchmarks.gpu_hour.check import Figures, main
from benchmarks.weights_in_flight import run

ON_GPU = "--shape 0.5b --workers 2 --publishes 8 --slots 64 --dtype bfloat16 --memory-fraction 0.25"
ON_CPU = "--workers 2 --publishes 3 --slots 4 --dtype float32"


def measure(figures: Figures, args: Namespace) -> None:
    backend = "gloo" if args.cpu and args.backend == "nccl" else args.backend
    found = run([*(ON_CPU if args.cpu else ON_GPU).split(), "--backend", backend])
    parts = ", ".join(f"{name} {found[name]}" for name in found if name.endswith("_ms"))
    figures.add(**found, summary=f"{backend}, {found['mib']} MiB, digests equal; {parts}")


if __name__ == "__main__":
    main(measure, "--backend")
