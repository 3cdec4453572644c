"""What a run needs of the machine and of the user's environment, besides its configuration.

    home              W&B, vLLM, matplotlib and others keep files there
    temporary files   a directory whose path is short enough for the names of Ray's sockets
    open files        the soft limit is raised to the hard one, which has to be high enough

In: the environment. Out: the limit raised, or UserError in one line with what to set, before any process starts. Does
not own: room on disks, GPUs.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from tempfile import TemporaryFile

from asyncdapo.config.config import Config
from asyncdapo.errors import UserError

LONGEST_PARENT = 103 - len("/ray-12345678/r/session_2026-11-21_05-32-37_688243_1234567/sockets/plasma_store")
"""Bytes: the path of a socket has at most 107 on Linux, 103 on macOS, and the longest of Ray's ends like this."""

FILES_OF_A_PROCESS, FILES_OF_A_PEER, FILES_OF_A_CORE = 256, 16, 8
"""Open files that a process of a run is granted, and further ones for each rank, worker and core of the machine (Ray
keeps a process for each). The busiest was seen to have 80, with two workers on two cores."""
ENOUGH_FILES = 65_536
"""The soft limit isn't raised above this: some programs go through every number below it."""


def check_surroundings(config: Config) -> None:
    """Raises UserError for what the user has to set first."""
    home = os.path.expanduser("~")
    if problem := _unusable(home):
        raise UserError(f"HOME: can't be used ({problem}), got {home!r} (set HOME to a directory of yours)")
    ray_parent()
    _raise_file_limit(config)


def ray_parent() -> Path:
    """Where a directory for Ray's files can be made: in TMPDIR, or in /tmp where that is too long. Raises UserError
    when neither will do."""
    given = os.environ.get("TMPDIR") or "/tmp"
    if problem := _unusable(given):
        raise UserError(f"TMPDIR: can't be used ({problem}), got {given!r} (set TMPDIR to a directory of yours)")
    for path in map(os.path.abspath, (given, "/tmp")):
        if len(os.fsencode(path)) <= LONGEST_PARENT and not _unusable(path):
            return Path(path)
    problem = f"is too long for the sockets of Ray, which may have {LONGEST_PARENT} bytes before them"
    raise UserError(f"TMPDIR: {problem}, got {given!r} (set TMPDIR to a shorter one)")


def _unusable(path: str) -> str:
    """Why no file can be made in this directory; nothing if one can."""
    try:
        with TemporaryFile(dir=path):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _raise_file_limit(config: Config) -> None:
    num_peers = config.learner.ranks + config.rollout.max_workers
    needed = FILES_OF_A_PROCESS + FILES_OF_A_PEER * num_peers + FILES_OF_A_CORE * (os.cpu_count() or 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_FILES if hard == resource.RLIM_INFINITY else hard
    if most < needed:
        problem = f"a process may have {most} files open, and this run needs up to {needed} in one"
        raise UserError(f"ulimit -n: {problem} (raise the hard limit: `ulimit -n {needed}`, or limits.conf as root)")
    wanted = min(most, max(ENOUGH_FILES, needed))
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
