"""CPU seconds of every process of a run, Ray's own included, between the first metrics line and the last but one.

    python benchmarks/cpu.py [--threads] [key=value …]

Launches the quickstart. Two looks at all that the driver has started, and what each process used between them: the
start of a process and the evaluations that run alone at both ends are left out. `--threads` shows the threads of each,
too. A process that ended in between isn't counted. Compare runs of one seed and one number of steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config

LOOK_S = 0.1
LEAST_S = 0.1
"""What used less isn't shown."""


@dataclass(frozen=True, kw_only=True)
class Used:
    """CPU seconds of one process so far."""

    name: str
    total_s: float
    threads: dict[str, float]
    """By number and name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", action="store_true", help="show the threads of each process")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further keys of the run")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"run.dir={folder}/run", "run.seed=0", "metrics.wandb=disabled", *args.overrides]
        wall_s, before, after = measure(keys, Path(folder, "run"))
    print_table(wall_s, before, after, with_threads=args.threads)


def measure(keys: Sequence[str], run_dir: Path) -> tuple[float, dict[int, Used], dict[int, Used]]:
    """Seconds between the two looks, and what every process had used at each. Raises CalledProcessError when the launch
    fails."""
    steps = load_config(find_config("quickstart"), keys).run.steps
    command = [sys.executable, "-m", "asyncdapo.cli", "launch", "quickstart", *keys]
    looks: dict[int, tuple[float, dict[int, Used]]] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            num_lines = count_lines(run_dir / "metrics.jsonl")
            if num_lines in (1, steps) and num_lines not in looks:
                looks[num_lines] = time.monotonic(), used_by_tree(driver.pid)
            time.sleep(LOOK_S)
    if driver.returncode:
        raise subprocess.CalledProcessError(driver.returncode, command)
    (began, before), (ended, after) = looks[1], looks[steps]
    return ended - began, before, after


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def used_by_tree(pid: int) -> dict[int, Used]:
    """Of this process and all below it, by pid."""
    driver = psutil.Process(pid)
    found: dict[int, Used] = {}
    for process in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            threads = {
                f"{thread.id} {thread_name(process.pid, thread.id)}": thread.user_time + thread.system_time
                for thread in process.threads()
            }
            name = "controller" if process == driver else describe(process)
            found[process.pid] = Used(name=name, total_s=times.user + times.system, threads=threads)
    return found


def describe(process: psutil.Process) -> str:
    """Its name, and of a Python module which one."""
    words = process.cmdline()
    return words[words.index("-m") + 1] if "-m" in words else process.name()


def thread_name(pid: int, thread: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()
    return "?"


def print_table(wall_s: float, before: dict[int, Used], after: dict[int, Used], *, with_threads: bool) -> None:
    nothing = Used(name="", total_s=0.0, threads={})
    rows = [(used.total_s - before.get(pid, nothing).total_s, pid, used) for pid, used in after.items()]
    print(f"{sum(seconds for seconds, *_ in rows):.1f} CPU seconds in {wall_s:.1f} s\n")
    print("| process | CPU s |\n|---|---|")
    for seconds, pid, used in sorted(rows, key=lambda row: -row[0]):
        if seconds < LEAST_S:
            continue
        print(f"| {used.name} | {seconds:.2f} |")
        if with_threads:
            earlier = before.get(pid, nothing).threads
            spent = {name: total_s - earlier.get(name, 0.0) for name, total_s in used.threads.items()}
            for name, thread_s in sorted(spent.items(), key=lambda pair: -pair[1]):
                if thread_s >= LEAST_S:
                    print(f"| &nbsp; thread {name} | {thread_s:.2f} |")


if __name__ == "__main__":
    main()
