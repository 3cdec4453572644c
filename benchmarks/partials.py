"""What it costs to save half-sampled groups: the message, and the ledger.

    python benchmarks/partials.py [--tokens 1024 8192] [--saves 40] [--dir DIR]

A worker's part is `pack` of a group of 16; the server's is a transaction that is synced, with the row replaced each
time. `ledger` is the size of ledger.db with its WAL folded, at the end: it doesn't grow with the number of saves.
`--dir` must be on the disk to be measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from asyncdapo.messages import Prompt
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.rollout.engine import Sampled
from asyncdapo.rollout.partials import pack

GROUP_SIZE = 16
NUM_GROUPS = 4
"""As many as 64 slots hold."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--saves", type=int, default=40)
    parser.add_argument("--dir", type=Path)
    args = parser.parse_args()
    print(f"{'tokens':>8}{'MB a save':>11}{'pack ms':>9}{'write ms':>10}{'p99 ms':>8}{'ledger MB':>11}")
    for num_tokens in args.tokens:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            measure(Path(folder), num_tokens, args.saves)


def measure(run_dir: Path, num_tokens: int, num_saves: int) -> None:
    """A line for groups whose completions have so many tokens."""
    found = [
        Sampled(
            token_ids=np.arange(num_tokens, dtype=np.int32),
            logprobs=np.full(num_tokens, -0.5, np.float32),
            versions=[(0, num_tokens)],
        )
        for _ in range(GROUP_SIZE)
    ]
    journal = Journal(run_dir)
    journal.write(core.WorkerJoined(worker=0, loaded_version=0), [])
    for index in range(NUM_GROUPS):
        grant = core.GrantLease(lease_id=index + 1, prompt_id=index, worker=0, attempt=1)
        prompt = Prompt(prompt_id=index, epoch=0, source="", row=index, token_ids=[1], answer="")
        journal.write(core.Ready(worker=0, credits=1), [grant], prompts=[prompt])
    partial = core.Partial(min_version=0, max_version=0, num_tokens=GROUP_SIZE * num_tokens)
    packed, written = [], []
    for number in range(num_saves):
        began = time.perf_counter()
        _, frames = pack(1, found, handed_back=False)
        packed.append(time.perf_counter() - began)
        prompt_id = number % NUM_GROUPS
        save = core.SavePartial(prompt_id=prompt_id, lease_id=prompt_id + 1, partial=partial)
        began = time.perf_counter()
        journal.write(core.PartialSaved(lease_id=prompt_id + 1, partial=partial), [save], saved=(b"", *frames))
        written.append(time.perf_counter() - began)
    journal.fold()
    size = sum(path.stat().st_size for path in run_dir.glob("ledger.db*"))
    journal.close()
    num_bytes = sum(memoryview(frame).nbytes for frame in frames)
    pack_ms, write_ms, p99_ms = (
        1e3 * seconds for seconds in (np.median(packed), np.median(written), np.quantile(written, 0.99))
    )
    print(f"{num_tokens:>8}{num_bytes / 1e6:>11.2f}{pack_ms:>9.2f}{write_ms:>10.1f}{p99_ms:>8.1f}{size / 1e6:>11.1f}")


if __name__ == "__main__":
    main()
