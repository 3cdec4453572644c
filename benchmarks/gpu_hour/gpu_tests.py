"""The project's own tests that need a GPU, in one pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace

from benchmarks.gpu_hour.check import Figures, hold, main


def measure(figures: Figures, args: Namespace) -> None:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rfEs", *args.files.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)}
    figures.add(counts=counts, summary=", ".join(f"{number} {word}" for word, number in counts.items()))
    figures.add(failed=re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))
    hold(done.returncode == 0, f"pytest ended with code {done.returncode}")
    hold(args.cpu or counts.get("passed", 0) > 0, "no test was run")


if __name__ == "__main__":
    main(measure, "--files")
