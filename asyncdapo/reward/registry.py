"""Finds the verifier that `reward.verifier` names: one of VERIFIERS, or the user's function.

A built-in verifier is a module in `verifiers/` with a function `verify`, imported on demand. A name with a colon is a
function of the user's (`plugins.py`).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Awaitable, Callable, Mapping

from asyncdapo.errors import ConfigError
from asyncdapo.plugins import is_plugin, load_plugin
from asyncdapo.reward.signature import check_signature

Said = float | Mapping[str, float | str | None]
AsyncVerify = Callable[[str, str], Awaitable[Said]]
Verify = Callable[[str, str], Said] | AsyncVerify
"""(text of the response, expected answer) -> the verdict, a number from 0 (wrong) to 1 (right); or a dict of numbers
with the verdict as `acc`. The dict may have the text `pred`, the answer found in the response (None: it has none). The
built-in verifiers return both. A user's function may be async."""

VERIFIERS = ("answer", "dapo", "exact", "gsm8k", "math_verify", "reasoning_gym")
EXTRAS = {"math_verify": "math", "reasoning_gym": "reasoning-gym"}
"""Verifier -> the extra of this package (optional dependencies) that it needs."""

KEY = "reward.verifier"


def make_verifier(name: str) -> Verify:
    """The verifier that `reward.verifier` names. Raises ConfigError that says what is wrong with it."""
    if not is_plugin(name):
        return _known(name)
    fix = "name yours as path/to/file.py:function, or one of " + ", ".join(VERIFIERS)
    verify = load_plugin(KEY, name, fix)
    check_signature(KEY, name, verify)
    return verify


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
