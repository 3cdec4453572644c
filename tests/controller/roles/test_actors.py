"""What a process of the run says, by whichever way, is in its own log; what it is made of stays."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdapo.controller.roles.actors import _import_to_stay

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
