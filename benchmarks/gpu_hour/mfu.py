"""The learner's step, by `benchmarks/learner.py`: tokens a second, MFU and peak memory of its variants."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.gpu_hour.check import Figures, hold, main

BENCH = Path(__file__).resolve().parents[1] / "learner.py"
VARIANTS = "ours,ours+compile,ours+compile+selective,ours+compile+full,ours+full,ours+compile+unshared,padded"
ON_GPU = f"--lengths mixed --groups 4 --group-size 8 --tokens-per-microbatch 32768 --padded-tokens 8192 \
--repeats 4 --warmup 3 --variants {VARIANTS}"
ON_CPU = "--lengths fixed:32 --groups 2 --group-size 2 --repeats 1 --warmup 1 --threads 1 --device cpu \
--variants ours,padded"


def measure(figures: Figures, args: Namespace) -> None:
    file = args.figures.with_suffix(".bench.json")
    shape = "tiny" if args.cpu else args.shape
    options = ["--shape", shape, *(ON_CPU if args.cpu else ON_GPU).split(), "--json", str(file)]
    done = subprocess.run([sys.executable, str(BENCH), *options], check=False)
    hold(file.exists(), f"the bench ended with code {done.returncode}")
    found = json.loads(file.read_text())
    peaks, num_tokens = found["peaks"], found["num_tokens"]
    rows = {row["variant"]["name"]: _row(row, peaks, num_tokens) for row in found["rows"]}
    figures.add(peaks=peaks, check=found["check"], wrong=found["wrong"], num_tokens=num_tokens, rows=rows)
    best = max((row for row in rows if "tflops" in rows[row]), key=lambda row: rows[row]["tflops"], default=None)
    figures.add(summary=f"best: {best}, {rows[best]}" if best else "no variant was measured")
    hold(done.returncode == 0, f"the bench ended with code {done.returncode}: {found['wrong']}")


def _row(row: dict, peaks: dict, num_tokens: int) -> dict[str, object]:
    if not row["seconds"]:
        return {"failure": row["failure"]}
    seconds = statistics.median(row["seconds"])
    flops = row["flops"] / seconds
    found = {"tok_s": round(num_tokens / seconds), "tflops": flops / 1e12, "peak_gib": row["peak_bytes"] / (1 << 30)}
    if peaks["data_sheet"]:
        found["mfu"] = flops / peaks["data_sheet"]
    return {name: float(f"{value:.4g}") for name, value in found.items()}


if __name__ == "__main__":
    main(measure, "--shape")
