"""Faults on purpose, for tests: bad links, a kill at a named point, a slow worker, a slow or full disk.

In: the `faults` section, once per process (`install`). Out: the faults of this process. With the section's defaults
there are none, and every call below costs one comparison. Random faults are seeded by the section, the process and the
socket, so a failing run can be repeated. Each entry of `faults.kill` kills once per run: a file in RUN_DIR/faults marks
that it did, so the next life of the process passes the point.
Does not own: how sockets apply a bad link (`transport/lossy`), and how the other processes react.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncdapo.errors import ConfigError
from asyncdapo.ranges import NonNegativeFloat, Share

POINTS = {
    "replay": {
        "before_commit": "a transaction is complete and not committed",
        "after_commit": "a transaction is committed and nobody told",
        "after_send": "a message is on its way, an acknowledgement or a batch for example",
        "in_roll_back": "a rollback is written and not committed",
        "in_covered": "freed payloads are struck from the ledger and their files still there",
    },
    "rollout": {
        "after_lease": "a lease arrived and nothing is sampled for it",
        "before_send_group": "a group is scored and not sent",
        "after_send_group": "a group is sent and not acknowledged",
        "in_load_weights": "new weights arrived and are not in use",
    },
    "learner": {
        "before_train": "a batch arrived and isn't trained on",
        "after_train": "a batch is trained on and nobody told",
        "in_send_weights": "the others wait for weights that aren't sent",
        "in_give_shards": "rank 0 gathers weights and hasn't this rank's shards of them",
        "in_checkpoint": "a checkpoint is written and doesn't have its name yet",
        "after_checkpoint": "a checkpoint is whole and nobody told",
    },
    "controller": {
        "after_train": "the learner has trained and the ledger doesn't know",
        "after_trained": "the ledger has the step and the workers perhaps not its weights",
        "after_publish": "the workers have the weights and the ledger doesn't know",
        "after_checkpoint": "a checkpoint is whole and the ledger doesn't know",
    },
}
"""Where `faults.kill` can kill: the points that each kind of process passes."""
KILL = re.compile(r"(controller|replay|learner(?:-[1-9]\d*)?|rollout-\d+)\.(\w+)(?::([1-9]\d*))?")
HOLD_S = 0.1
"""How long a message is held back, so that later ones overtake it."""
SLOW_WORKER = "rollout-0"

Frames = Sequence[bytes | bytearray | memoryview]

log = logging.getLogger("faults")


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Deliberate faults, for tests of a whole run. The defaults inject none."""

    seed: int = 0
    """Seed of everything that is random here, so that a failed run can be repeated."""
    drop: Share = 0.0
    """Share of the messages between workers, replay server and learner that are lost."""
    duplicate: Share = 0.0
    """Share of these messages that arrive twice."""
    reorder: Share = 0.0
    """Share of these messages that arrive after later ones."""
    truncate: Share = 0.0
    """Share of these messages that lose the end of a frame."""
    delay_s: NonNegativeFloat = 0.0
    """Longest delay of a message in seconds. Messages keep their order."""
    kill: tuple[str, ...] = ()
    """`process.point[:n]`: the process is killed (kill -9) when it passes the point for the n-th time, once per run. An
    example is learner.after_train:3; the points are in asyncdapo/faults.py."""
    slow_worker_s: NonNegativeFloat = 0.0
    """Seconds by which worker 0 is slower on each group."""
    slow_disk_s: NonNegativeFloat = 0.0
    """Seconds by which each ledger transaction and each checkpoint is slower."""
    disk_full_after_mb: NonNegativeFloat = 0.0
    """MB that the replay server or the learner can write before the disk counts as full; 0 is no limit."""

    def __post_init__(self) -> None:
        for entry in self.kill:
            parse_kill(entry)


def install(process: str, settings: FaultsConfig, run_dir: Path) -> None:
    """Set the name of this process ("replay", "learner", "rollout-0", "controller") and its faults."""
    global _faults
    _faults = _Faults(process, settings, run_dir) if settings != FaultsConfig() else None


def point(name: str) -> None:
    """This process has reached a point of `POINTS`. It may be killed here."""
    if _faults:
        _faults.pass_point(name)


def disk_write(num_bytes: int) -> None:
    """The process is about to write `num_bytes`. Raises OSError (ENOSPC) if the disk is full."""
    if _faults:
        _faults.write(num_bytes)


async def slow_worker() -> None:
    """A worker has finished a group or an evaluation. The slow worker waits here."""
    if _faults and _faults.worker_s:
        await asyncio.sleep(_faults.worker_s)


def link() -> Link | None:
    """The faults of the messages that a new socket of this process sends; None if there are none."""
    return _faults.next_link() if _faults else None


def parse_kill(entry: str) -> tuple[str, str, int]:
    """Process, point and n of "process.point[:n]". Raises ConfigError that names the points there are."""
    match = KILL.fullmatch(entry)
    if not match:
        raise ConfigError("faults.kill", "an entry is process.point[:n]", entry, "learner.after_train:3")
    process, name, which = match.groups()
    points = POINTS[process.split("-")[0]]
    if name not in points:
        raise ConfigError("faults.kill", f"{process} has no such point", entry, f"it has {', '.join(points)}")
    return process, name, int(which or 1)


class Link:
    """Decides what happens to each message of one socket. It sends nothing."""

    def __init__(self, settings: FaultsConfig, name: str) -> None:
        self._settings, self._random = settings, random.Random(f"{settings.seed} {name}")
        self._last_at = -math.inf

    def pass_on(self, frames: Frames, now: float) -> list[tuple[float, Frames]]:
        """What to send instead of these frames, and when. Delays alone keep the order of messages."""
        chances = [
            self._random.random() for _ in range(5)
        ]  # always five, so that one setting doesn't change the draws of another
        drop, duplicate, truncate, reorder, delay = chances
        settings = self._settings
        if drop < settings.drop:
            return []
        self._last_at = at = max(math.nextafter(self._last_at, math.inf), now + delay * settings.delay_s)
        if truncate < settings.truncate:
            frames = self._cut(frames)
        if reorder < settings.reorder:
            at += HOLD_S
        return [(at, frames)] * (2 if duplicate < settings.duplicate else 1)

    def _cut(self, frames: Frames) -> Frames:
        """Cut off the end of one frame. The first one, the header, is never empty, so there is one to choose."""
        views = [memoryview(frame).cast("B") for frame in frames]
        chosen = self._random.choice([index for index, view in enumerate(views) if len(view)])
        views[chosen] = views[chosen][: self._random.randrange(len(views[chosen]))]
        return views


class _Faults:
    """The faults of this process."""

    def __init__(self, process: str, settings: FaultsConfig, run_dir: Path) -> None:
        log.warning("faults on purpose in %s: %s", process, settings)
        self._process, self._settings, self._marks = process, settings, run_dir / "faults"
        self._marks.mkdir(parents=True, exist_ok=True)
        self._kills = [(entry, *parse_kill(entry)) for entry in settings.kill]
        self._passed: Counter[str] = Counter()
        self._num_links = self._num_bytes = 0
        self.worker_s = settings.slow_worker_s if process == SLOW_WORKER else 0.0

    def pass_point(self, name: str) -> None:
        assert name in POINTS[self._process.split("-")[0]], f"{self._process} has no point {name}"
        self._passed[name] += 1
        for entry, *when in self._kills:
            if when == [self._process, name, self._passed[name]] and not (self._marks / entry).exists():
                (self._marks / entry).touch()
                log.warning("faults.kill: %s", entry)
                os.kill(os.getpid(), signal.SIGKILL)

    def write(self, num_bytes: int) -> None:
        """A full disk is full for every process of the run, and stays full."""
        time.sleep(self._settings.slow_disk_s)
        self._num_bytes += num_bytes
        full, limit_mb = self._marks / "disk_full", self._settings.disk_full_after_mb
        if limit_mb and (self._num_bytes > limit_mb * 1e6 or full.exists()):
            full.touch()
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (faults.disk_full_after_mb)")

    def next_link(self) -> Link | None:
        settings = self._settings
        if not any((settings.drop, settings.duplicate, settings.reorder, settings.truncate, settings.delay_s)):
            return None
        self._num_links += 1
        return Link(settings, f"{self._process} {self._num_links}")


_faults: _Faults | None = None
