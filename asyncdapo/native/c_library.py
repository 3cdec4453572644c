"""C library: a C file of this package, compiled for this processor, and kept for later starts.

In: the file, which may include the headers beside this module, and its macros; the compiler that `CC` names (without,
`cc`). Out: the loaded library, or CompilerError where there is no compiler or it fails. Compiling takes half a second,
so the result is kept in `$XDG_CACHE_HOME/asyncdapo` (without that variable, `~/.cache/asyncdapo`), 50 kB for each set
of macros.

Invariants: the name of a kept file is the digest of all that it depends on: source, headers, command, version of the
compiler, C library and processor, so that machines may share a home. It appears whole, whatever else compiles or is
killed meanwhile. It is loaded only if nobody but this user can have written it. Where nothing can be kept, every start
compiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HEADERS = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
COMPILE_TIMEOUT_S = 60
CPUINFO = Path("/proc/cpuinfo")
CHANGING = ("processor", "cpu mhz", "bogomips", "apicid", "initial apicid", "core id", "physical id", "siblings")
"""Lines of /proc/cpuinfo that don't say what a processor can compute."""


class CompilerError(Exception):
    """There is no compiler, or it fails; says why."""


@dataclass(frozen=True)
class Signature:
    """What a function takes, in this order: int64 sizes, double factors, addresses of arrays. It returns nothing, or a
    double."""

    num_sizes: int
    num_arrays: int
    num_factors: int = 0
    returns_double: bool = False


def load_c(
    source: Path, macros: Mapping[str, object], functions: Mapping[str, Signature], log: logging.Logger, what: str
) -> ctypes.CDLL | None:
    """The library with these functions. None, and a warning that says `what` is slower, where it can't be compiled."""
    try:
        library = compile_c(source, macros)
    except CompilerError as error:
        log.warning("%s is half as fast as with a C compiler (CC, or cc): %s", what, error)
        return None
    for name, signature in functions.items():
        counts = signature.num_sizes, signature.num_factors, signature.num_arrays
        kinds = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
        function = getattr(library, name)
        function.argtypes = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
        function.restype = ctypes.c_double if signature.returns_double else None
    return library


def compile_c(source: Path, macros: Mapping[str, object]) -> ctypes.CDLL:
    """Raises CompilerError."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, *FLAGS, *(f"-D{name}={macros[name]}" for name in macros)]
    try:
        kept = _place(source, command, _run([*compiler, "--version"]))
        return (kept and _kept(kept)) or _compiled(source, command, kept)
    except subprocess.CalledProcessError as error:
        raise CompilerError(error.stderr.strip() or str(error)) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(str(error)) from error


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    return done.stdout


def _place(source: Path, command: list[str], version: str) -> Path | None:
    """Where the result of this command is kept; None where it can't be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not (base.is_absolute() and CPUINFO.exists()):
        return None
    directory = base / "asyncdapo"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    if not _is_own(directory):
        return None
    texts = [path.read_text() for path in (source, *sorted(HEADERS.glob("*.h")))]
    depends_on = *texts, *command, version, *platform.libc_ver(), platform.machine(), _processor()
    return directory / f"{source.stem}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()}.so"


def _processor() -> str:
    """What the kernel says of the first processor, and of all where they differ."""
    lines = {" ".join(line.split()) for line in CPUINFO.read_text().splitlines()}
    return "\n".join(sorted(line for line in lines if not line.lower().startswith(CHANGING)))


def _is_own(path: Path) -> bool:
    """Whether it is this user's, and not to be written by others. No symbolic link is."""
    status = path.lstat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _kept(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path)) if _is_own(path) else None
    except OSError:  # there is none, or it can't be loaded
        return None


def _compiled(source: Path, command: list[str], kept: Path | None) -> ctypes.CDLL:
    """Raises OSError, CalledProcessError or TimeoutExpired."""
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory, "library.so")
        _run([*command, f"-I{HEADERS}", str(source), "-lm", "-o", str(built)])
        if kept:
            with suppress(OSError):  # no room, or not writable: the next start compiles again
                _keep(built.read_bytes(), kept)
        return ctypes.CDLL(str(built))


def _keep(content: bytes, path: Path) -> None:
    """Others may do the same at once: each writes a file of its own, and the last one stays."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(unfinished, path)
    except OSError:
        os.unlink(unfinished)
        raise
