"""Verifiers by name, or by where the user's function is.

A name is one of VERIFIERS: a module in `verifiers/` with a function `verify`, imported when it is asked for. Anything
with a colon is a function of the user's: `package.module:function`, `path/to/file.py:function`. A file finds its
neighbours: its folder is searched for modules, after all others.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from traceback import TracebackException
from types import ModuleType

from asyncdapo.errors import ConfigError
from asyncdapo.reward.signature import check_signature

Said = float | Mapping[str, float | str | None]
Verify = Callable[[str, str], Said | Awaitable[Said]]
"""(text of the response, expected answer) -> verdict: 1 right, 0 wrong, between them part of the credit; or numbers by
name, of which `acc` is the verdict, and `pred`, text: what it took for the response's answer (None: it has none). Ours
say both. The user's may be an async function."""

VERIFIERS = ("answer", "dapo", "exact", "gsm8k", "math_verify", "reasoning_gym")
EXTRAS = {"math_verify": "math", "reasoning_gym": "reasoning-gym"}
"""Of the package's optional dependencies, those that a verifier needs."""

KEY = "reward.verifier"


def make_verifier(name: str) -> Verify:
    """The verifier that `reward.verifier` names. Raises ConfigError that says what is wrong with it."""
    if ":" not in name:
        return _known(name)
    where, _, function = name.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        fix = "name yours as path/to/file.py:function, or one of " + ", ".join(VERIFIERS)
        raise ConfigError(KEY, f"no such file ({Path(where).absolute()})", name, fix)
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise _broken(name, error) from error
        fix = "is it installed, or on PYTHONPATH? A file is named path/to/file.py:function"
        raise ConfigError(KEY, f"no module {error.name}", name, fix) from None
    except (Exception, SystemExit) as error:  # the user's module runs its own code when it is imported
        raise _broken(name, error) from error
    verify = getattr(module, function, None)
    if not callable(verify):
        raise ConfigError(KEY, f"{where} has no function {function or '(name it after the colon)'}", name)
    check_signature(KEY, name, verify)
    return verify


def absolute_verifier(name: str) -> str:
    """The same verifier wherever it is looked for: a file's path is made absolute."""
    where, _, function = name.rpartition(":")
    return f"{Path(where).absolute()}:{function}" if where.endswith(".py") else name


def _known(name: str) -> Verify:
    if name not in VERIFIERS:
        nearest = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.0)[0]
        fix = f"try {nearest}, or a function of yours as package.module:function or path/to/file.py:function"
        raise ConfigError(KEY, f"unknown, there are {', '.join(VERIFIERS)}", name, fix)
    try:
        return importlib.import_module(f"asyncdapo.reward.verifiers.{name}").verify
    except ModuleNotFoundError as error:
        if name not in EXTRAS:
            raise
        fix = f"in the clone: pip install -e '.[{EXTRAS[name]}]'"
        raise ConfigError(KEY, f"needs the module {error.name}, which is not installed", name, fix) from error


def _load_file(path: Path) -> ModuleType:
    """The module in a file, under a name that no installed one has."""
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"reward_verifier_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there for the module of a class
    spec.loader.exec_module(module)
    return module


def _broken(name: str, error: BaseException) -> ConfigError:
    """The module is there and can't be imported. Names the last line of its own that was running."""
    report = TracebackException.from_exception(error)
    frames = [frame for frame in report.stack if not frame.filename.startswith("<frozen")]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, SyntaxError) else ""
    return ConfigError(KEY, f"can't be imported: {type(error).__name__}: {report}{where}", name)
