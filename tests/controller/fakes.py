"""Which method a command reaches, for fakes of processes that are told by its name what to answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from asyncdapo.controller.roles.learner import LearnerProcess
from asyncdapo.controller.roles.replay import ReplayProcess
from asyncdapo.controller.roles.rollout import RolloutProcess

ROLES = {"learner": LearnerProcess, "replay": ReplayProcess, "rollout": RolloutProcess}

Pick = Callable[[Any], Callable[..., Any]]


def picked(name: str, pick: Pick, *args: Any) -> str:
    """The method that `pick` picks of the process `name`: its real class has to have it, and it has to take `args`."""
    method = pick(ROLES[name.partition("-")[0]])
    inspect.signature(method).bind(None, *args)
    return method.__name__
