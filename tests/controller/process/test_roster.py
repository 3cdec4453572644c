"""Who is who: the file is always whole and current, and nobody but the very process of an entry is ever signalled."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from asyncdapo.controller.process import roster
from asyncdapo.controller.process.roster import (
    Entry,
    Roster,
    end,
    end_survivors,
    entry_of,
    is_running,
    survivors,
    this_process,
)
from asyncdapo.errors import DiskError, UserError
from tests.controller.living import STUBBORN, eventually, living


def entry(role: str, index: int = 0, pid: int = 2**22 + 1) -> Entry:
    """By default of a process that can't exist: pids end below."""
    return Entry(role=role, index=index, pid=pid, host=socket.gethostname(), started=1.5)


def write_former(run_dir: Path, *entries: Entry) -> None:
    Roster(run_dir).set("former", entries)


def test_the_file_lists_every_process_by_role_and_index(tmp_path: Path) -> None:
    entries = Roster(tmp_path)
    entries.set("rollout-1", [entry("rollout", 1), entry("scorer", 1)])
    entries.set("learner-1", [entry("learner", 1)])
    entries.set("learner", [entry("learner")])
    entries.set("rollout-0", [entry("rollout", 0), entry("scorer", 0)])
    entries.set("controller", [this_process("controller")])

    written = json.loads((tmp_path / "processes.json").read_text())
    assert [(one["role"], one["index"]) for one in written] == [
        ("controller", 0), ("rollout", 0), ("rollout", 1), ("scorer", 0), ("scorer", 1), ("learner", 0),
        ("learner", 1),
    ]  # fmt: skip
    assert [one.name for one in entries.entries()[-2:]] == ["learner", "learner-1"]
    assert all(one.keys() == {"role", "index", "pid", "host", "started"} for one in written)
    assert (written[0]["pid"], written[0]["host"]) == (os.getpid(), socket.gethostname())
    assert roster.read(tmp_path) == entries.entries()


def test_a_directory_that_has_gone_away_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"gone/processes.json: can't be written: No such file or directory"):
        Roster(tmp_path / "gone").set("controller", [this_process("controller")])


def test_a_restart_takes_the_place_of_the_process_before_with_all_that_it_had_started(tmp_path: Path) -> None:
    entries = Roster(tmp_path)
    entries.set("rollout-0", [entry("rollout", pid=11), entry("scorer", pid=12)])
    entries.set("rollout-0", [entry("rollout", pid=21)])
    assert [one.pid for one in roster.read(tmp_path)] == [21]


def test_the_entries_of_a_process_that_ended_are_handed_back_so_that_its_children_can_be_ended(tmp_path: Path) -> None:
    entries = Roster(tmp_path)
    entries.set("rollout-0", [entry("rollout", pid=11), entry("scorer", pid=12)])
    assert [one.pid for one in entries.of("rollout-0")] == [11, 12]
    entries.remove("rollout-0")
    assert roster.read(tmp_path) == []
    assert entries.of("rollout-0") == []


def test_the_file_is_written_only_when_something_changed(tmp_path: Path) -> None:
    entries, path = Roster(tmp_path), tmp_path / "processes.json"
    entries.set("learner", [entry("learner", pid=11)])
    first = path.stat().st_ino
    entries.set("learner", [entry("learner", pid=11)])
    assert path.stat().st_ino == first
    entries.set("learner", [entry("learner", pid=12)])
    assert path.stat().st_ino != first


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    entries, over = Roster(tmp_path), threading.Event()
    entries.set("learner", [entry("learner")])

    def change() -> None:
        for round_ in range(150):
            entries.set("rollout-0", [entry("scorer", index, pid=round_ + 1) for index in range(round_ % 20)])
        over.set()

    writer = threading.Thread(target=change)
    writer.start()
    num_seen = set()
    while not over.is_set():
        num_seen.add(len(roster.read(tmp_path)))
    writer.join()
    assert len(num_seen) > 1
    assert list(tmp_path.iterdir()) == [tmp_path / "processes.json"]


def test_started_is_the_moment_the_process_began() -> None:
    before = time.time()
    with living() as process:
        assert before - 1.1 <= entry_of("scorer", 0, process.pid).started <= time.time() + 0.1


def test_a_running_process_is_known_by_pid_host_and_start() -> None:
    with living() as process:
        mine = entry_of("replay", 0, process.pid)
        assert is_running(mine)
        assert not is_running(replace(mine, started=mine.started - 60))  # the pid was given away again
        assert not is_running(replace(mine, host="elsewhere"))
        process.kill()
        assert eventually(lambda: not is_running(mine))  # a zombie: nobody has waited for it yet
        process.wait()
        assert not is_running(mine)


def test_a_process_stays_known_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with living() as process:
        mine = entry_of("replay", 0, process.pid)
        now = psutil.boot_time() + 60  # the kernel counts from boot: setting the clock moves the time of that
        monkeypatch.setattr(psutil, "boot_time", lambda: now)
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: now)
        assert is_running(mine)


def test_a_stopped_process_still_runs() -> None:
    with living() as process:
        mine = entry_of("replay", 0, process.pid)
        process.send_signal(signal.SIGSTOP)
        assert is_running(mine)


def test_survivors_are_what_still_lives_of_the_former_launch(tmp_path: Path) -> None:
    assert survivors(tmp_path) == []
    with living() as process:
        alive = entry_of("rollout", 1, process.pid)
        write_former(tmp_path, alive, entry("learner"), this_process("controller"))
        assert survivors(tmp_path) == [alive]


def test_a_survivor_that_ends_in_time_is_not_killed(tmp_path: Path) -> None:
    code = "import sys, time; print('ready', flush=True); time.sleep(0.5); sys.exit(7)"
    with living(code) as process:
        write_former(tmp_path, entry_of("replay", 0, process.pid))
        assert end_survivors(tmp_path, wait_s=20) == []
        assert process.wait() == 7


def test_a_survivor_that_stays_is_killed_and_gone_when_the_call_returns(tmp_path: Path) -> None:
    with living(STUBBORN) as process, living() as stopped:
        stopped.send_signal(signal.SIGSTOP)
        former = [entry_of("rollout", 0, process.pid), entry_of("learner", 0, stopped.pid)]
        write_former(tmp_path, *former)
        assert end_survivors(tmp_path, wait_s=0.2) == former
        assert survivors(tmp_path) == []
        assert (process.wait(), stopped.wait()) == (-9, -9)


def test_a_process_that_got_the_pid_of_another_is_left_alone(tmp_path: Path) -> None:
    with living() as process:
        stranger = entry_of("replay", 0, process.pid)
        write_former(tmp_path, replace(stranger, started=stranger.started - 60))
        assert end_survivors(tmp_path, wait_s=0.1) == []
        assert end([replace(stranger, host="elsewhere")]) == []
        assert process.poll() is None


def test_a_run_in_progress_is_refused_and_loses_nobody(tmp_path: Path) -> None:
    with living() as controller, living() as learner:
        write_former(tmp_path, entry_of("controller", 0, controller.pid), entry_of("learner", 0, learner.pid))
        with pytest.raises(UserError, match=f"in use by a run: its controller, process {controller.pid}, lives"):
            end_survivors(tmp_path, wait_s=0.2)
        assert controller.poll() is None
        assert learner.poll() is None


def test_another_users_process_is_named(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can start a process of another user")
    with living() as process:
        mine = entry_of("replay", 0, process.pid)
        code = (
            "import os\n"
            "from asyncdapo.controller.process.roster import Entry, end\n"
            "from asyncdapo.errors import RunError\n"
            "os.setuid(65534)\n"
            "try:\n"
            f"    end([{mine!r}])\n"
            "except RunError as error:\n"
            "    print(error)\n"
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert f"replay (process {process.pid}) belongs to another user" in printed
        assert process.poll() is None


def test_a_file_of_another_kind_is_said_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "processes.json").write_text('[{"role": "learner"}]')
    with pytest.raises(UserError, match=r"processes\.json is not a list of processes: .*index"):
        survivors(tmp_path)
