"""Whether a machine has what torch.compile calls: a compiler, of C++ for a CPU, of C for a GPU, and Python's headers,
which the code that it writes includes. No torch here."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from asyncdapo.errors import ConfigError

KEY = "learner.compile"
COMPILERS = {
    "cpu": ("CXX", ("clang++" if sys.platform == "darwin" else "g++",)),
    "cuda": ("CC", ("gcc", "clang")),
}
"""The variable that names it, and what is looked for without."""


def check_compiler(device: str, value: bool | None) -> None:
    """Raises ConfigError where there is no compiler for this device (cpu, cuda, or auto, for which either will do), or
    no Python.h. `value` is what the config says."""
    kinds = [COMPILERS[kind] for kind in COMPILERS if device in (kind, "auto")]
    named = [[os.environ[variable]] if variable in os.environ else usual for variable, usual in kinds]
    names = [name for choice in named for name in choice]
    if not any(map(shutil.which, names)):
        problem = f"needs a compiler on this machine, and there is no {' or '.join(names)}"
        variables = " or ".join(variable for variable, _ in kinds)
        raise ConfigError(KEY, problem, value, f"install one, name one in {variables}, or use learner.compile=false")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        problem = f"needs the headers of Python, and there is no {header}"
        raise ConfigError(KEY, problem, value, f"install them ({package} on Debian), or use learner.compile=false")
