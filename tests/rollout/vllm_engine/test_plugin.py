"""Children of an engine's process end with it, other users' don't. Needs no vLLM: the plugin is one function."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.vllm_engine.arguments import set_environment

PROGRAM = """
import multiprocessing, os, sys, time
from asyncdapo.rollout.vllm_engine.plugin import PARENT_VARIABLE, register

def live(depth, pids):
    register()
    register()  # as vLLM does
    pids.put(os.getpid())
    if depth:
        multiprocessing.get_context("spawn").Process(target=live, args=(depth - 1, pids)).start()
    time.sleep(60)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    if sys.argv[1] != "unset":
        os.environ[PARENT_VARIABLE] = str(os.getpid()) if sys.argv[1] == "own" else "1"
    register()
    pids = spawn.Queue()
    spawn.Process(target=live, args=(1, pids)).start()
    print(pids.get(), pids.get(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("variable", "ends"), [("own", True), ("unset", False), ("another's", False)])
def test_the_kill_of_a_process_ends_the_vllm_processes_below_it_where_they_are_its_engines(tmp_path, variable, ends):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, str(program), variable], stdout=subprocess.PIPE, text=True) as process:
        pidfds = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
        process.kill()
    try:
        timeout_s = 20 if ends else 0.5  # the kernel sends the signal before it lets the parent be waited for
        found = [bool(select.select([pidfd], [], [], timeout_s)[0]) for pidfd in pidfds]
        assert found == [ends, ends]
    finally:
        for pidfd in pidfds:
            if not select.select([pidfd], [], [], 0)[0]:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def test_whoever_lists_the_plugins_that_vllm_may_call_still_has_ours(monkeypatch):
    monkeypatch.setattr(os, "environ", {"VLLM_PLUGINS": "theirs"})
    set_environment(RolloutConfig())
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    [ours] = project["entry-points"]["vllm.general_plugins"]
    assert os.environ["VLLM_PLUGINS"].split(",") == ["theirs", ours]
