"""Verifiers by name. A new one is a module in `verifiers/` with a function, and a line in VERIFIERS."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from asyncdapo.errors import ConfigError
from asyncdapo.reward.verifiers import answer

Verify = Callable[[str, str], float]
"""(text of the response, expected answer) -> verdict: 1 right, 0 wrong, between them part of the credit."""

VERIFIERS: dict[str, Verify] = {"answer": answer.verify}


def make_verifier(name: str) -> Verify:
    """The verifier that `reward.verifier` names. Raises ConfigError for an unknown one."""
    if name not in VERIFIERS:
        nearest = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.0)[0]
        raise ConfigError("reward.verifier", f"unknown, there are {', '.join(VERIFIERS)}", name, f"try {nearest}")
    return VERIFIERS[name]
