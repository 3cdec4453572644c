"""What a process for the user's code does first, whatever its interpreter: standard library only.

In: the pid of the process that started it. Out: the socket at its standard input. Afterwards standard input is
/dev/null, processes that it forks don't inherit the socket, and only the parent handles Ctrl-C. On Linux it dies with
its parent, even inside code that never returns. Also loads the user's files. Does not own: the parent's side
(`process`), what is said over the socket.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType

PR_SET_PDEATHSIG = 1


def enter(parent: int) -> socket.socket:
    """Called once, at the start of the process. `parent`: the pid of who started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    if sys.platform == "linux":  # the kernel kills it as soon as the thread that started it is gone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this one, is gone")
    sock = socket.socket(fileno=os.dup(0))
    os.register_at_fork(after_in_child=sock.close)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    return sock


def load_file(path: Path) -> ModuleType:
    """The module in a file, under a name that no installed module has. It can import the file's neighbours."""
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"asyncdapo_plugin_{path.stem}", path)
    assert spec is not None, "the name ends in .py"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there for the module of a class
    spec.loader.exec_module(module)
    return module
