"""Groups per second that the journal writes, with and without waiting for the disk.

    python benchmarks/acks.py [--dir DIR] [--groups 512] [--tokens 1024] [--rounds 3]

Groups of 16 completions, with `--tokens` tokens in all, arrive 1, 8 or 64 at a time; those that arrive together are one
transaction, which waits for the disk once. `synced` is what a run does: it syncs a segment before the transaction that
points to it, and the transaction before its acknowledgements. `not` leaves both to the operating system. The two take
turns. The core and the sockets are not measured. `--dir` must be on the disk to be measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group, Prompt
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.transport.payload import Payload

GROUP_SIZE = 16
FSYNC = os.fsync


def make_group(lease_id: int, num_tokens: int) -> tuple[Group, Payload]:
    each = num_tokens // GROUP_SIZE
    completion = Completion(
        contexts=[Context.of_turn([(0, each)], [(1, each)], NO_CHECKSUM)],
        finish_reason="stop",
        reward=1.0,
        metrics={"acc": 1.0},
    )
    group = Group(
        prompt_id=lease_id,
        lease_id=lease_id,
        branch=0,
        attempt=1,
        worker=0,
        num_prompt_tokens=64,
        completions=[completion] * GROUP_SIZE,
        generate_s=1.0,
    )
    sizes = 64, each * GROUP_SIZE
    return group, Payload(np.zeros(sizes[0], np.int32), np.ones(sizes[1], np.int32), np.ones(sizes[1], np.float32))


def lease(journal: Journal, num: int) -> None:
    joined = core.WorkerJoined(worker=0, loaded_version=0)
    journal.write(joined, [], detail="bench")
    prompts = [Prompt(prompt_id=i, epoch=0, source="", row=i, token_ids=[1], answer="") for i in range(1, num + 1)]
    grants = [core.GrantLease(lease_id=p.prompt_id, prompt_id=p.prompt_id, worker=0, attempt=1) for p in prompts]
    journal.write(core.Ready(worker=0, credits=num), grants, prompts=prompts)


def arrive(journal: Journal, lease_id: int, arrived: tuple[Group, Payload]) -> None:
    done = core.GroupArrived(lease_id=lease_id, min_version=0, max_version=0, metrics={}, num_loss_tokens=1)
    ends = core.EndLease(lease_id=lease_id, prompt_id=lease_id, worker=0, outcome="done", reason="")
    moves = core.MoveGroup(group_id=lease_id, prompt_id=lease_id, state="queued", verdict="kept")
    journal.write(done, [ends, moves], arrived=arrived)


def groups_per_s(folder: Path, num: int, num_tokens: int, together: int, *, synced: bool) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        journal = Journal(Path(run_dir))
        lease(journal, num)
        groups = [make_group(lease_id, num_tokens) for lease_id in range(1, num + 1)]
        if not synced:
            journal._db.execute("PRAGMA synchronous = NORMAL")
            os.fsync = lambda descriptor: None
        started = time.perf_counter()
        for first in range(0, num, together):
            with journal.together():
                for group in groups[first : first + together]:
                    arrive(journal, group[0].lease_id, group)
        taken_s = time.perf_counter() - started
        os.fsync = FSYNC
        journal.close()
    return num / taken_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path())
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for together in (1, 8, 64):
        rates: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(args.rounds):
            for synced, found in rates.items():
                found.append(groups_per_s(args.dir, args.groups, args.tokens, together, synced=synced))
        synced, unsynced = (statistics.median(rates[key]) for key in (True, False))
        print(f"{together:3d} together: {synced:7,.0f} groups/s synced, {unsynced:7,.0f} not: {synced / unsynced:.2f}")


if __name__ == "__main__":
    main()
