"""What `environment.path` names, in a host.

agent:…                        a program that calls the model by itself
reset, step                    a class of the native contract
reset, get_reward, no step     TRL's
init, step, close              SkyRL's
"""

from __future__ import annotations

import importlib
from pathlib import Path

from asyncdapo.child.entry import load_file
from asyncdapo.environment.in_host.agent import Agent
from asyncdapo.environment.in_host.answers import UnusableError
from asyncdapo.environment.in_host.native import Native
from asyncdapo.environment.in_host.skyrl import SkyRL
from asyncdapo.environment.in_host.trl import Trl

AGENT = "agent:"


def load(name: str) -> Native | Agent:
    """Raises UnusableError, and what the user's module raises."""
    where, _, attribute = name.removeprefix(AGENT).rpartition(":")
    module = load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    found = getattr(module, attribute)
    if name.startswith(AGENT):
        return Agent(found)
    if not isinstance(found, type):
        raise UnusableError(f"{attribute} is no class")
    has = {method for method in ("init", "step", "close", "reset", "get_reward") if hasattr(found, method)}
    if has >= {"init", "step", "close"} and "reset" not in has:
        return SkyRL(found)
    return Trl(found) if has >= {"reset", "get_reward"} and "step" not in has else Native(found)
