"""What `environment.path` names, in a host.

agent:…                        a program that calls the model by itself
openenv:URL                    a server of OpenEnv
verifiers:TASKSET              a taskset of verifiers
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
from asyncdapo.environment.in_host.openenv import OpenEnv
from asyncdapo.environment.in_host.skyrl import SkyRL
from asyncdapo.environment.in_host.trl import Trl
from asyncdapo.environment.in_host.verifiers_taskset import Taskset

AGENT, OPENENV, VERIFIERS = "agent:", "openenv:", "verifiers:"


def load(name: str, tokenizer: str) -> Native | Agent | OpenEnv | Taskset:
    """`tokenizer`: where the model's is. Raises UnusableError, and what the user's module raises."""
    if name.startswith(OPENENV):
        return OpenEnv(name.removeprefix(OPENENV))
    if name.startswith(VERIFIERS):
        return Taskset(name.removeprefix(VERIFIERS), tokenizer)
    where, _, attribute = name.removeprefix(AGENT).rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise UnusableError(f"there is no file {where}")
    module = load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    if not hasattr(module, attribute):
        raise UnusableError(f"{where} has no {attribute!r}")
    found = getattr(module, attribute)
    if name.startswith(AGENT):
        return Agent(found)
    if not isinstance(found, type):
        raise UnusableError(f"{attribute} is no class; a function that calls the model is named agent:{name}")
    has = {method for method in ("init", "step", "close", "reset", "get_reward") if hasattr(found, method)}
    if has >= {"init", "step", "close"} and "reset" not in has:
        return SkyRL(found)
    return Trl(found) if has >= {"reset", "get_reward"} and "step" not in has else Native(found)
