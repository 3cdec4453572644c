"""What a process of the run says, by whichever way, is in its own log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
