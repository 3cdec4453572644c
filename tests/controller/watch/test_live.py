"""`asyncdapo watch` of a live run on a real terminal: it follows, and Ctrl-C leaves the terminal as it was."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from asyncdapo.controller.process.roster import Roster, entry_of
from tests.controller.living import living
from tests.controller.runs import command
from tests.controller.watch.run_files import bound_by_learner, run_files

ENTERS, LEAVES = b"\x1b[?1049h", b"\x1b[?1049l"
"""The alternate screen."""
END_S = 60.0


def read_until(terminal: int, text: bytes) -> bytes:
    """What the terminal gets until this text is in it."""
    shown, deadline = b"", time.monotonic() + END_S
    while text not in shown:
        assert time.monotonic() < deadline, shown[-2000:]
        shown += os.read(terminal, 1 << 16)
    return shown


@pytest.mark.soak
def test_a_live_run_is_followed_until_ctrl_c_which_leaves_the_screen_as_it_was(tmp_path: Path) -> None:
    lines = bound_by_learner(6)
    run_files(tmp_path, lines[:-1])
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with living() as controller:
        Roster(tmp_path).set("test", [entry_of("controller", 0, controller.pid)])
        watch = subprocess.Popen(
            command("watch", str(tmp_path)),
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        assert ENTERS in read_until(ours, b"step 6/36")
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        read_until(ours, b"step 7/36")
        os.write(ours, b"\x03")
        read_until(ours, LEAVES)
        assert watch.wait(END_S) == 0
    os.close(ours)
    os.close(its)
