"""Two sharded ranks, killed while they write a checkpoint beside their training: no torn one is ever used, at most the
steps since the newest whole one are lost, and what resumes is the run that was never killed, bit for bit."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from asyncdapo import faults
from asyncdapo.faults import FaultsConfig
from asyncdapo.learner.step.ranks import Ranks
from asyncdapo.learner.storage import host_copy
from asyncdapo.learner.storage.checkpoint import (
    MANIFEST,
    Found,
    Manifest,
    Piece,
    begin_checkpoint,
    commit_checkpoint,
    find_checkpoint,
    remove_old_checkpoints,
)
from asyncdapo.learner.storage.host_copy import HostCopy
from tests.learner.ranks import RankProcess, die, with_shards
from tests.learner.tiny import make_batch, make_learner, save_tiny_llama, train

NUM_KILLS = 40
EVERY = 2
"""Steps from one checkpoint to the next."""
LARGE = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 4096, "num_hidden_layers": 4}
"""Its checkpoints have 16 MiB, so writing takes a moment."""
CONFIG = {"warmup_steps": 3, "weight_decay": 0.1}
MOST_S = 0.4
"""Of a random delay: writing one takes less."""
FAR = 10_000


class Death(NamedTuple):
    """What kills the ranks of a life."""

    kind: str
    """`delay`: both, at a random moment of the writing; `piece`: one of them, in front of a piece that it writes;
    `point`: rank 0, when all is written and has no name yet."""
    rank: int = 0
    which: int = 1
    """Checkpoint of the life, or piece that the rank writes in it."""
    delay_s: float = 0.0


def draw(rng: random.Random, number: int) -> Death:
    kind = ("delay", "piece", "delay", "point")[number % 4]
    which = rng.randrange(1, 160) if kind == "piece" else rng.randrange(1, 3)
    return Death(kind, rank=0 if kind == "point" else rng.randrange(2), which=which, delay_s=rng.uniform(0, MOST_S))


# ------------------------------------------------------------------------------------------------------ in each process


def learn(ranks: Ranks, path: str, run_dir: Path, life: int, death: Death | None, until: int) -> None:
    """Resume, train to step `until`, and write checkpoints beside it, as a run does."""
    if death and ranks.rank == death.rank:
        arm(death, run_dir / f"life-{life}")
    learner = make_learner(path, ranks=with_shards(ranks, 2), **CONFIG)
    if checkpoint := find(run_dir).path:
        learner.restore(checkpoint)
    note = partial(append, run_dir / f"journal-{life}") if ranks.rank == 0 else lambda *_: None
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        for step in range(learner.version + 1, until + 1):
            train(learner, *make_batch(step, seed=step))
            note("trained", step)
            if step % EVERY:
                continue
            if writing:
                writing.result()
            if ranks.rank == 0:
                begin_checkpoint(run_dir, step)
            ranks.largest(0)
            copied = learner.copy()
            note("copied", step)
            writing = writer.submit(write, ranks.rank, copied, run_dir, step, life, note)
        if writing:
            writing.result()


def arm(death: Death, marks: Path) -> None:
    if death.kind == "point":
        faults.install("learner", FaultsConfig(kill=(f"learner.in_checkpoint:{death.which}",)), marks)
    elif death.kind == "piece":
        written, write_piece = count(1), host_copy._write

        def write_or_die(directory: Path, part: host_copy._Part) -> Piece:
            if next(written) == death.which:
                die()
            return write_piece(directory, part)

        host_copy._write = write_or_die


def write(rank: int, copied: HostCopy, run_dir: Path, step: int, life: int, note: Callable[..., None]) -> None:
    """What the controller does between the ranks, it does by a file."""
    pieces, of_other = copied.write(run_dir, step), run_dir / f"pieces-{life}-{step}"
    if rank:
        unfinished = of_other.with_suffix(".new")
        unfinished.write_bytes(msgspec.json.encode(pieces))
        unfinished.rename(of_other)
        return
    while not of_other.exists():
        time.sleep(0.001)
    pieces += msgspec.json.decode(of_other.read_bytes(), type=list[Piece])
    path = commit_checkpoint(run_dir, step, 0, pieces, num_ranks=2, num_shards=2)
    note("written", step, digest(path))
    remove_old_checkpoints(run_dir, 2)


def append(journal: Path, *words: object) -> None:
    with journal.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


# ------------------------------------------------------------------------------------------------------------- outside


def find(run_dir: Path) -> Found:
    return find_checkpoint(run_dir, dict.fromkeys(range(FAR), 0))


def digest(path: Path) -> str:
    """Of every byte of a checkpoint, as its manifest has them."""
    manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    return sha256(msgspec.json.encode(manifest.pieces)).hexdigest()


def live(path: str, run_dir: Path, life: int, death: Death | None, until: int = FAR) -> None:
    """Start both ranks. Returns when both have ended."""
    ranks = [RankProcess(rank, 2, learn, path, run_dir, life, death, until) for rank in range(2)]
    try:
        ranks[1].tell(ranks[0].result())
        if death is None:
            assert [rank.result() for rank in ranks] == [None, None]
        elif death.kind == "delay":
            wait_for_writing(run_dir, death.which, ranks)
            time.sleep(death.delay_s)
            ranks[death.rank].process.kill()
        else:
            assert wait([rank.process.sentinel for rank in ranks], timeout=120), "nobody was killed"
    finally:
        for rank in ranks:
            rank.stop()


def wait_for_writing(run_dir: Path, which: int, ranks: list[RankProcess]) -> None:
    """Until a checkpoint is begun that this life hasn't found, the `which`th of them."""
    left, seen = {path.name for path in unfinished(run_dir)}, set()
    deadline = time.monotonic() + 120
    while len(seen) < which:
        names = {path.name for path in unfinished(run_dir)}
        left &= names
        seen |= names - left
        assert all(rank.process.is_alive() for rank in ranks)
        assert time.monotonic() < deadline
        time.sleep(0.002)


def unfinished(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob(".step-*.new"))


def said(run_dir: Path, life: int, word: str) -> list[list[str]]:
    journal = run_dir / f"journal-{life}"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [line.split()[1:] for line in lines if line.startswith(word)]


def last(run_dir: Path, life: int, word: str) -> int:
    """The newest step that this life has trained, copied or written; 0 for none."""
    return max((int(words[0]) for words in said(run_dir, life, word)), default=0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ranks_killed_at_any_moment_of_the_writing_resume_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path, run_dir, rng = save_tiny_llama(tmp_path / "model", **LARGE), tmp_path / "run", random.Random(0)
    (run_dir / "checkpoints").mkdir(parents=True)
    before, used, moments, lost = 0, {}, Counter(), Counter()
    for life in range(NUM_KILLS):
        death = draw(rng, life)
        live(path, run_dir, life, death)
        found, trained, copied = find(run_dir), last(run_dir, life, "trained"), last(run_dir, life, "copied")
        assert found.problems == [], "a torn checkpoint has a name"
        assert found.step in {copied - EVERY, copied} if copied else found.step == before, (death, before, copied)
        assert max(before, last(run_dir, life, "written")) <= found.step
        moments["while it was written" if unfinished(run_dir) else "between two"] += 1
        lost[max(trained, before) - found.step] += 1
        if found.path:
            used[found.step] = digest(found.path)
        before = found.step
    print(f"{NUM_KILLS} kills: {dict(moments)}; steps lost: {dict(sorted(lost.items()))}; step {before} at the end")
    assert moments["while it was written"] > NUM_KILLS / 2
    straight = tmp_path / "straight"
    (straight / "checkpoints").mkdir(parents=True)
    live(path, straight, 0, None, before)
    expected = {int(step): of_step for step, of_step in said(straight, 0, "written")}
    assert used.items() <= expected.items()
    assert len(used) > NUM_KILLS / 4
