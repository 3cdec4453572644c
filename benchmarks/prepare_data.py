"""Time and memory of `asyncdapo data prepare` for a generated file in the shape of DAPO-Math-17k.

    python benchmarks/prepare_data.py [--repeats 100]

17,398 distinct prompts, 519 of them twice under another index, everything repeated as in the published file. Prints the
command's own counts, seconds and the peak memory of its process. Needs 1.5 GB of disk meanwhile.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
from pyarrow import parquet

NUM_PROMPTS, NUM_AGAIN = 17_398, 519
WORDS = "the number of positive integers such that sum x y triangle circle radius find value where m n coprime".split()
INSTRUCTION = "Solve the following problem. The last line of your response must be of the form Answer: X.\n\n"


def made_rows() -> list[dict[str, object]]:
    rng = random.Random(0)
    rows = [_row(f"{' '.join(rng.choices(WORDS, k=rng.randrange(40, 110)))} ({i})", rng) for i in range(NUM_PROMPTS)]
    return rows + [row | {"extra_info": {"index": f"{rng.getrandbits(128):032x}"}} for row in rows[:NUM_AGAIN]]


def _row(question: str, rng: random.Random) -> dict[str, object]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": INSTRUCTION + question, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(rng.randrange(1000)), "style": "rule"},
        "extra_info": {"index": f"{rng.getrandbits(128):032x}"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, table = Path(folder) / "data.parquet", pyarrow.Table.from_pylist(made_rows())
        with parquet.ParquetWriter(file, table.schema) as writer:
            for _ in range(args.repeats):
                writer.write_table(table)
        print(f"{table.num_rows * args.repeats:,} rows, {file.stat().st_size / 1e6:.0f} MB", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "asyncdapo.cli", "data", "prepare", str(file), "--out", f"{folder}/out"]
        subprocess.run(command, check=True)
        took_s = time.monotonic() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = used.ru_utime + used.ru_stime
        print(f"{took_s:.1f} s, {cpu_s:.1f} s of one core, {used.ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
