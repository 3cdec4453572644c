"""The front door in Python: launching a run, its exit codes and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import asyncdapo
from asyncdapo import api
from asyncdapo.errors import RunError, UserError
from tests.docs.blocks import python_cells_of


@pytest.mark.soak
def test_the_page_launches_a_run_and_the_same_launch_finds_it_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names: dict[str, Any] = {}
    for cell in python_cells_of("docs/python.md"):
        exec(cell, names)
    assert [line["step"] for line in names["run"].metrics()] == [0, 1, 2]
    asyncdapo.launch(names["config"])
    assert "has its 2 steps" in capfd.readouterr().out


def test_a_wrong_value_is_a_user_error_with_the_words_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    config = asyncdapo.load_config("quickstart", run={"dir": str(tmp_path)})
    with pytest.raises(UserError, match="^run.dir: is in use: it holds other"):
        asyncdapo.launch(config)


def _program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> Any:
    """A config whose launch runs `code` instead of `python -m asyncdapo launch FILE`."""
    script = tmp_path / "program"
    script.write_text(f"#!{sys.executable}\n{code}")
    script.chmod(0o755)
    monkeypatch.setattr(api.sys, "executable", str(script))
    return asyncdapo.load_config("quickstart")


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("print('step 1'); print('asyncdapo: the run ended: out of memory'); exit(1)", RunError, "the run ended: out"),
        ("print('asyncdapo: 2 keys\\n  first\\n  second'); exit(2)", UserError, "^2 keys\n  first\n  second$"),
        ("print('ValueError: of ours'); exit(1)", RunError, "^ValueError: of ours$"),
        ("exit(130)", RunError, "stopped from elsewhere"),
        ("import os; os.kill(os.getpid(), 9)", RunError, "exit code -9"),
    ],
)
def test_the_exit_code_of_a_launch_becomes_its_error(
    code: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        asyncdapo.launch(_program(monkeypatch, tmp_path, code))


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """Also if these tests were started in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_is_passed_on_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ready, done = tmp_path / "ready", tmp_path / "done"
    code = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        f"    print('stopping', flush=True); time.sleep(0.5); pathlib.Path({str(done)!r}).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "while True: time.sleep(0.1)\n"
    )
    config = _program(monkeypatch, tmp_path, code)

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        asyncdapo.launch(config)
    assert done.exists()
    assert "stopping" in capfd.readouterr().out
