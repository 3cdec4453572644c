"""Runs a program of a model's: `python -I sandbox.py CPU_S MEMORY_BYTES FILE_BYTES`. Standard library only.

In: the program on standard input. Out: what it prints, its exit code. Where Linux lets users have namespaces of their
own, it has no network, and all that it starts ends with it; elsewhere neither is so. It can read what this user can
read: a sandbox against mistakes and waste, no jail.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG = 1
MAX_FILES = 64
MAX_PROCESSES = 32


def main(cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    program = sys.stdin.read()
    isolate()
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_NPROC, MAX_PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})


def isolate() -> None:
    """Go on in a child that is the first process of its own namespace: when it ends, the kernel ends all others."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET):
        return
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
