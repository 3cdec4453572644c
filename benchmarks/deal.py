"""How even the work of the learner's ranks is, as the replay server deals batches.

    python benchmarks/deal.py [--ranks 8 16 32] [--draws 20]      32 groups of 16 drawn answers, Qwen2.5-7B's shape
    python benchmarks/deal.py --run RUN [--ranks 2 4]             the batches of a run whose tokens are kept, its model

One row per number of ranks: the mean work of a rank beside the largest, the least and the mean over all batches; the
mean if whole groups were dealt, the heaviest first; parts of groups at ranks; the time of a deal. Work is the floating
point operations of a forward pass. The mean counts each prompt once in all, so what is computed twice counts as lost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from asyncdapo import Run, load_config
from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group
from asyncdapo.model.shape import PUBLISHED, Shape, read_shape
from asyncdapo.records.record import PAYLOAD_FOLDER, Place, read_records
from asyncdapo.shares import Batch, Dealer, share_of

NUM_GROUPS, GROUP_SIZE = 32, 16
MEDIAN, LONGEST, SIGMA = 4_000, 20_000, 1.0
"""Tokens of the drawn answers, which are log-normal."""
PROMPT_TOKENS = (50, 400)


def drawn(seed: int) -> list[Group]:
    draw = np.random.default_rng(seed)
    lengths = np.minimum(LONGEST, draw.lognormal(np.log(MEDIAN), SIGMA, (NUM_GROUPS, GROUP_SIZE))).astype(int)
    return [group(number, int(draw.integers(*PROMPT_TOKENS)), line) for number, line in enumerate(lengths.tolist())]


def group(number: int, num_prompt_tokens: int, lengths: Sequence[int]) -> Group:
    completions = [
        Completion(
            contexts=[Context.of_turn([(0, length)], [(1, length)], NO_CHECKSUM)],
            finish_reason="stop",
            reward=0.0,
            metrics={},
        )
        for length in lengths
    ]
    ids = dict.fromkeys(("prompt_id", "lease_id"), number) | dict.fromkeys(("branch", "attempt", "worker"), 0)
    return Group(**ids, num_prompt_tokens=num_prompt_tokens, completions=completions, generate_s=0.0)


def batches_of(run_dir: Path) -> Iterator[list[Group]]:
    run, step = Run(run_dir), 1
    while rows := run.groups(step=step):
        places = {row["group_id"]: Place(row["segment"], row["offset"], row["bytes"]) for row in rows}
        records = read_records(run_dir / PAYLOAD_FOLDER, places)
        yield [records[group_id][0] for group_id in places]
        step += 1


def flops(shape: Shape, headers: Iterable[Group]) -> int:
    """Of a forward pass at one rank, which has the completions of these headers."""
    total = 0
    for header in headers:
        num_prompt = header.num_prompt_tokens
        total += shape.forward_flops(num_prompt, 0, num_prompt * (num_prompt + 1) // 2)
        for length in (completion.num_tokens for completion in header.completions):
            total += shape.forward_flops(length, length, length * num_prompt + length * (length + 1) // 2)
    return total


def whole_groups(shape: Shape, groups: Iterable[Group], num_ranks: int) -> float:
    """The heaviest group to the rank with the least work: the mean beside the largest."""
    loads = [0] * num_ranks
    for work in sorted((flops(shape, [one]) for one in groups), reverse=True):
        loads[loads.index(min(loads))] += work
    return statistics.mean(loads) / max(loads)


def measure(shape: Shape, batches: Sequence[Sequence[Group]], num_ranks: int) -> None:
    even, whole, parts, seconds = [], [], [], []
    for groups in batches:
        began_s = time.perf_counter()
        deal = Dealer(num_ranks, pair_cost=shape.pair_cost).deal(groups)
        seconds.append(time.perf_counter() - began_s)
        batch = Batch(step=1, branch=0, max_staleness=0, groups=list(groups), deal=deal)
        shares = [[piece.header for piece in share_of(batch, rank)] for rank in range(num_ranks)]
        even.append(flops(shape, groups) / num_ranks / max(flops(shape, share) for share in shares))
        whole.append(whole_groups(shape, groups, num_ranks))
        parts.append(sum(map(len, shares)))
    mean = statistics.mean
    print(
        f"{num_ranks:6d}{min(even):10.3f}{mean(even):8.3f}{mean(whole):14.3f}{mean(parts):8.1f}"
        f"{statistics.median(seconds) * 1e3:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    if args.run:
        shape, batches = load_config(args.run / "config.yaml").model.files.shape, list(batches_of(args.run))
    else:
        shape, batches = read_shape(PUBLISHED["Qwen/Qwen2.5-7B"]), [drawn(seed) for seed in range(args.draws)]
    print(f"{len(batches)} batches of {len(batches[0])} groups\n ranks     least    mean  whole groups   parts      ms")
    for num_ranks in args.ranks or ([2, 4] if args.run else [8, 16, 32]):
        measure(shape, batches, num_ranks)


if __name__ == "__main__":
    main()
