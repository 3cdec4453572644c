"""Plugin that vLLM calls in each of its processes: our vLLM processes end with the process that started them.

It asks the kernel for a parent-death signal, so that even after SIGKILL of a rollout worker no process is left. An
environment variable names the parent whose vLLM children are ours: first the process with the engine, then each child
for its own children. Other vLLM processes in the same Python environment, even below a rollout worker, have other
parents and are left alone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PLUGIN = "asyncdapo"
"""Name of the entry point in pyproject.toml."""
PARENT_VARIABLE = "ASYNCDAPO_VLLM_PARENT"
"""Process id of the parent of our vLLM processes."""
PR_SET_PDEATHSIG = 1


def register() -> None:
    """Entry point `vllm.general_plugins`. vLLM calls it several times in a process; only the first call counts."""
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(PARENT_VARIABLE) != str(parent.pid):
        return
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent.pid:  # it ended before the signal was asked for
        os._exit(1)
