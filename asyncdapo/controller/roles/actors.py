"""The Ray actors of a run: one class per role, whose name shows in process lists, and one way to call any of them.

The driver knows only these. What a process is made of is imported in the process itself: the driver and the replay
server never load torch, and a launch does not wait for it twice.

In: commands of the controller (`call`). Out: what the process's own method of that name answers; what it raises reaches
the controller as that call's error. Does not own: what the commands do (`replay_process`, `rollout_process`,
`learner_process`).
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asyncdapo import faults
from asyncdapo.config.config import Config
from asyncdapo.controller.process.stacks import install as install_stacks
from asyncdapo.messages import Prompt
from asyncdapo.transport.keys import RunKeys


def log_path(config: Config, name: str) -> Path:
    """The log of a process."""
    return Path(config.run.dir) / "logs" / f"{name}.log"


class Actor:
    """Hosts one process. An async actor: commands run in its event loop, `serve` as long as the process lives."""

    module: str
    """Where the process's class stands; it is called `Main`."""

    def __init__(self, name: str, config: Config, keys: RunKeys, index: int = 0) -> None:
        """`index` counts the processes of this role."""
        _open_log(log_path(config, name))
        faults.install(name, config.faults, Path(config.run.dir))
        self.main = importlib.import_module(self.module).Main(name, config, keys, index)

    async def call(self, command: str, *args: Any) -> Any:
        """What the process's method `command` returns."""
        return await getattr(self.main, command)(*args)


class ReplayActor(Actor):
    module = "asyncdapo.controller.roles.replay"


class RolloutActor(Actor):
    module = "asyncdapo.controller.roles.rollout"


class LearnerActor(Actor):
    module = "asyncdapo.controller.roles.learner"


def _open_log(path: Path) -> None:
    """This process's own log. What it and its children print goes there too, such as why vLLM could not start, and the
    stacks of a crash in native code."""
    path.parent.mkdir(exist_ok=True)
    stream = path.open("a", buffering=1)
    for printed in (1, 2):
        os.dup2(stream.fileno(), printed)
    logging.basicConfig(stream=stream, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    faulthandler.enable(stream)
    install_stacks(stream)


# --------------------------------------------------------------------------------- what travels with `start` of replay

NUM_PROBE_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a life of the replay server begins."""

    roll_back_to: int | None = None
    """Train step of the checkpoint that the run goes on from; none to take the ledger as it stands."""
    reason: str = ""
    totals: dict[str, float] = field(default_factory=dict)
    """The last metrics line, from which counts go on that aren't in the ledger."""
    ports: tuple[int, int] = (0, 0)
    """For workers and for the learner; 0 is any."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the others need to know of an open replay server."""

    branch: int
    rollout_address: str
    learner_address: str
    ports: tuple[int, int]
    data_ends: bool
    """Whether the prompts can be used up before the last step."""
    num_left_out: int
    """Rows whose prompt is too long."""
    num_eval_left_out: int
    """Of those for evaluation."""
    unknown: str
    """A line on prompts with text that the tokenizer doesn't know; empty where none has."""
    eval_prompts: list[Prompt]
    eval_texts: list[str]
    """Of these prompts, as the model reads them: special tokens are written out."""
    probe_prompts: list[list[int]]
    """Token ids of the first prompts of the stream, on which engines and learner are compared."""
