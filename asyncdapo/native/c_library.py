"""C library: a C file of this package, compiled for this processor and loaded.

In: the file and its macros. Out: the library; CompilerError where there is no C compiler, or it fails. Compiling takes
half a second, so nothing is kept for the next process: no file can be stale, and none is for another processor.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
TIMEOUT_S = 60


class CompilerError(Exception):
    """The compiler that `CC` names (without, `cc`) isn't there or fails; says why."""


def compile_c(source: Path, macros: Mapping[str, object]) -> ctypes.CDLL:
    """Raises CompilerError."""
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *(f"-D{name}={macros[name]}" for name in macros)]
    with tempfile.TemporaryDirectory() as directory:
        library = str(Path(directory, "library.so"))
        try:
            command += [str(source), "-o", library, "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
            return ctypes.CDLL(library)
        except subprocess.CalledProcessError as error:
            raise CompilerError(error.stderr.strip() or str(error)) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompilerError(str(error)) from error
