"""What the kernel says of a process, from Linux's /proc.

In: a pid. Out: its state, when it started, its memory, the signals it handles; None when there is no such process.
Invariant: pid and start time together name one process for good; a pid alone is given away again. Does not own: which
processes a run has (`roster`). Without /proc (macOS) every answer is None, and `HAS_PROC` says why.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROC = Path("/proc")
HAS_PROC = (PROC / "self" / "stat").exists()


@dataclass(frozen=True, kw_only=True)
class ProcessStat:
    """A process at this moment."""

    letter: str
    """State as `ps` shows it: R S D I run or sleep, T t are stopped, Z X are dead."""
    started: float
    """Seconds since 1970."""

    @property
    def stopped(self) -> bool:
        """By SIGSTOP or a debugger: alive, and unable to do anything."""
        return self.letter in "Tt"

    @property
    def dead(self) -> bool:
        """A zombie: only its pid is left."""
        return self.letter in "ZX"


def read_stat(pid: int) -> ProcessStat | None:
    """State and start of a process."""
    text = _read(pid, "stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    started = _boot_time() + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return ProcessStat(letter=fields[0], started=round(started, 2))


def command_name(pid: int) -> str | None:
    """Name of its program, the first 15 characters."""
    text = _read(pid, "comm")
    return None if text is None else text.rstrip("\n")


def memory_mib(pid: int) -> float | None:
    """Resident memory; None for a zombie too, which has none."""
    field = _status_field(pid, "VmRSS")
    return None if field is None else int(field.split()[0]) / 1024


def handles_signal(pid: int, signal: int) -> bool:
    """Whether the process has a handler of its own for this signal, so that it won't die of it."""
    mask = _status_field(pid, "SigCgt")
    return mask is not None and bool(int(mask, 16) >> (signal - 1) & 1)


def _status_field(pid: int, name: str) -> str | None:
    lines = (_read(pid, "status") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), None)


def _read(pid: int, name: str) -> str | None:
    try:
        return (PROC / str(pid) / name).read_text()
    except (FileNotFoundError, ProcessLookupError):  # the second when it ends between open and read
        return None


@cache
def _boot_time() -> int:
    lines = (PROC / "stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("btime "))
