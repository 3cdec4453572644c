"""What a process of the run says, by whichever way, is in its own log; what it is made of stays. A worker leaves the
cores to the learner, and hears that it should leave while it is being started."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdapo.config.config import Config
from asyncdapo.config.run import RunConfig
from asyncdapo.controller.roles import actors
from asyncdapo.controller.roles.actors import RolloutActor, _import_to_stay
from asyncdapo.controller.roles.base import ProcessSpec
from asyncdapo.model.config import ModelConfig
from asyncdapo.transport.keys import RunKeys

PROGRAM = """
import logging, os, subprocess, sys
from pathlib import Path
from asyncdapo.controller.roles.actors import _open_log
_open_log(Path(sys.argv[1]))
logging.getLogger("weights").info("logged")
print("printed", flush=True)
subprocess.run([sys.executable, "-c", "raise ValueError('the cause in a child')"])
os.abort()
"""


def test_a_log_has_what_is_printed_by_the_process_its_children_and_a_crash(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "rollout-0.log"
    said = subprocess.run([sys.executable, "-c", PROGRAM, str(log)], capture_output=True, text=True)
    text = log.read_text()
    for part in ("weights INFO logged", "printed", "ValueError: the cause in a child", "Fatal Python error: Aborted"):
        assert part in text
    assert said.stdout == said.stderr == ""


def test_what_a_process_is_made_of_is_left_alone_by_the_garbage_collector_which_runs_again() -> None:
    before = gc.get_freeze_count()
    _import_to_stay("tabnanny")
    assert gc.get_freeze_count() > before
    with pytest.raises(ModuleNotFoundError):
        _import_to_stay("asyncdapo.controller.roles.missing")
    assert gc.isenabled()


def test_a_worker_that_is_being_started_gives_way_to_others_and_says_that_it_was_sent_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_way: list[int] = []
    monkeypatch.setattr(actors, "_open_log", lambda path: None)
    monkeypatch.setattr(os, "nice", given_way.append)
    config = Config(model=ModelConfig(path="none"), run=RunConfig(dir=str(tmp_path)))
    actor = RolloutActor(ProcessSpec(role="rollout", index=3, config=config, keys=RunKeys.make()))
    try:
        before = asyncio.run(actor.health())
        os.kill(os.getpid(), signal.SIGTERM)
        after = asyncio.run(actor.health())
    finally:
        faulthandler.unregister(signal.SIGTERM)
    assert [entry.name for entry in before.entries] == ["rollout-3"]
    assert (before.leaving, after.leaving) == ("", "SIGTERM")
    assert given_way == [actors.GIVES_WAY]
