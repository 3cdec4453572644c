"""Plugin that vLLM calls in each of its processes: ours end with the process that started them.

The kernel sends the parent-death signal, so that not even SIGKILL of a rollout worker leaves a process that computes.
A variable names the process whose vLLM children are ours: the one with the engine, then each child for its own. Other
users of vLLM in the same Python environment, even below a rollout worker, have other parents and are left alone.
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
    """Entry point `vllm.general_plugins`. vLLM calls it several times in a process; the first one counts."""
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(PARENT_VARIABLE) != str(parent.pid):
        return
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent.pid:  # it ended before the signal was asked for
        os._exit(1)
