"""Loads the user's functions and classes by their location: `package.module:name` or `path/to/file.py:name`.

In: the config key and its value. Out: the object, or ConfigError for that key. A file can import its neighbours: its
folder is appended to the module search path. Does not own: what the object is given and returns.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from traceback import TracebackException
from typing import Any

from asyncdapo.child.entry import load_file
from asyncdapo.disk import sha256_of
from asyncdapo.errors import ConfigError


def is_plugin(name: str) -> bool:
    """Whether the value is a location of the user's code, not the name of something built in."""
    return ":" in name


def check_name(key: str, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError for a value that is neither a built-in name nor a location."""
    names = list(known)
    if name not in names and not is_plugin(name):
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        fix = f"try {nearest}, or one of yours as path/to/file.py:name or package.module:name"
        raise ConfigError(key, f"must be one of {', '.join(names)}", name, fix)


def load_plugin(key: str, name: str, fix: str = "") -> Callable[..., Any]:
    """The function or class that the value names. `fix`: shown if the file doesn't exist. Raises ConfigError."""
    where, _, attribute = name.rpartition(":")
    is_file = where.endswith(".py")
    if is_file and not Path(where).is_file():
        raise ConfigError(key, f"no such file ({Path(where).absolute()})", name, fix or "path/to/file.py:name")
    try:
        module = load_file(Path(where)) if is_file else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise broken(key, name, error) from error
        fix = "is it installed, or on PYTHONPATH? A file is named path/to/file.py:function"
        raise ConfigError(key, f"no module {error.name}", name, fix) from None
    except (Exception, SystemExit) as error:  # the user's module runs its own code when it is imported
        raise broken(key, name, error) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(key, f"{where} has no function {attribute or '(name it after the colon)'}", name)
    return found


cached_plugin = functools.cache(load_plugin)
"""`load_plugin`, but loaded once per process: for functions that are called in every step."""


def absolute_plugin(name: str) -> str:
    """The same value for any working directory: a file's path is made absolute. A kind in front, as in
    `agent:path/to/file.py:name`, stays."""
    before, _, attribute = name.rpartition(":")
    kind, colon, where = before.rpartition(":")
    return f"{kind}{colon}{Path(where).absolute()}:{attribute}" if where.endswith(".py") else name


def plugin_digest(key: str, name: str, interpreter: str | None = None) -> str:
    """Digest of the source file that the value names, not of what the file imports. `interpreter`: the one that imports
    a module, if not this one. Raises ConfigError."""
    where = name.rpartition(":")[0].rpartition(":")[2]
    try:
        return sha256_of(Path(where if where.endswith(".py") else _origin(where, interpreter)))
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(key, f"its source can't be read ({error})", name) from error


def _origin(module: str, interpreter: str | None) -> str:
    """The module's source file. Raises ImportError."""
    if interpreter is None:
        spec = importlib.util.find_spec(module)
        origin = spec.origin if spec else None
    else:
        program = "import importlib.util as util, sys; print(util.find_spec(sys.argv[1]).origin)"
        found = subprocess.run([interpreter, "-c", program, module], capture_output=True, text=True, check=False)
        origin = found.stdout.splitlines()[-1] if found.returncode == 0 else None  # packages may print, too
    if origin is None:
        raise ImportError(f"no module {module}" + (f" for {interpreter}" if interpreter else ""))
    return origin


def check_call(key: str, name: str, function: Callable[..., Any], form: str, *given: object, **named: object) -> None:
    """Raises ConfigError if `function` doesn't take these arguments. `form`: the call, for the message."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        raise ConfigError(key, f"can't be called as {form}: {error}", name, f"it takes {signature}") from None


def broken(key: str, name: str, error: BaseException, what: str = "can't be imported") -> ConfigError:
    """The error for user code that raised. Names the last line of that code that ran."""
    report = TracebackException.from_exception(error)
    frames = [frame for frame in report.stack if not frame.filename.startswith("<frozen")]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, SyntaxError) else ""
    return ConfigError(key, f"{what}: {type(error).__name__}: {report}{where}", name)
