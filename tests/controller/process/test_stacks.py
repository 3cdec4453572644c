"""Stacks: of this process down to what each task awaits, and of one that can't answer, without harm to any other."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path

import pytest

from asyncdapo.controller.process.roster import STOPPED, entry_of, state_of
from asyncdapo.controller.process.stacks import ask, collect, request_stacks, stacks
from tests.asynchronous import asynchronous
from tests.controller.living import SLEEP, eventually, living

STARTED = """
import sys, time
from asyncdapo.controller.process.stacks import install
log = open(sys.argv[1], "a", buffering=1)
log.write("a line of before\\n")
install(log)
"""

BLOCKED_LOOP = (
    STARTED
    + """
import asyncio
async def take_batch():
    print("ready", flush=True)
    time.sleep(600)  # in the event loop: no other task has a turn
asyncio.run(take_batch())
"""
)

HELD_GIL = (
    STARTED
    + """
import ctypes
def hold_the_gil():
    print("ready", flush=True)
    while True:
        ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the GIL during the call
hold_the_gil()
"""
)


async def innermost() -> None:
    await asyncio.get_running_loop().create_future()


async def outermost() -> None:
    await innermost()


@asynchronous
async def test_a_task_is_shown_down_to_what_it_awaits() -> None:
    task = asyncio.create_task(outermost(), name="serve")
    await asyncio.sleep(0)
    text = stacks()
    task.cancel()
    _, _, shown = text.partition("task serve outermost:")
    assert "await innermost()" in shown
    assert "create_future()" in shown
    assert shown.index("in outermost") < shown.index("in innermost")


@asynchronous
async def test_the_tasks_of_a_loop_can_be_shown_from_a_thread() -> None:
    task = asyncio.create_task(outermost(), name="serve")
    await asyncio.sleep(0)
    of_the_loop = await asyncio.to_thread(stacks, asyncio.get_running_loop())
    of_threads_only = await asyncio.to_thread(stacks)
    task.cancel()
    assert "task serve outermost:" in of_the_loop.splitlines()
    assert not any(line.startswith("task ") for line in of_threads_only.splitlines())


def test_every_thread_is_shown_by_name_with_the_call_it_is_in() -> None:
    let_go, entered = threading.Event(), threading.Event()

    def broadcast_weights() -> None:
        entered.set()
        let_go.wait()

    thread = threading.Thread(target=broadcast_weights, name="learner_0")
    thread.start()
    entered.wait()
    text = stacks()
    let_go.set()
    thread.join()
    assert "in broadcast_weights" in text.partition("thread learner_0:")[2]
    assert "thread MainThread:" in text


@pytest.mark.parametrize(("code", "function"), [(BLOCKED_LOOP, "take_batch"), (HELD_GIL, "hold_the_gil")])
def test_a_process_that_cant_answer_dumps_its_stacks_and_lives_on(tmp_path: Path, code: str, function: str) -> None:
    log = tmp_path / "learner.log"
    with living(code, str(log)) as process:
        learner = entry_of("learner", 0, process.pid)
        for _ in range(2):
            text = ask(learner, log)
            assert text.count(f"in {function}") == 1
            assert "a line of before" not in text
        assert process.poll() is None


def test_only_what_was_added_to_the_log_is_collected(tmp_path: Path) -> None:
    log = tmp_path / "learner.log"
    assert collect(log, 0) == ""
    log.write_text("before\n")
    offset = log.stat().st_size
    with log.open("a") as file:
        file.write("after\n")
    assert collect(log, offset) == "after\n"


def test_a_stopped_process_is_said_to_be_stopped_and_gets_no_signal(tmp_path: Path) -> None:
    log = tmp_path / "learner.log"
    with living(BLOCKED_LOOP, str(log)) as process:
        learner = entry_of("learner", 0, process.pid)
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: state_of(learner) in STOPPED)
        assert ask(learner, log) == "learner: it is stopped"
        process.send_signal(signal.SIGCONT)
        eventually(lambda: state_of(learner) not in STOPPED)
        assert "in take_batch" in ask(learner, log)
        assert log.read_text().count("in take_batch") == 1


def test_a_process_without_the_handler_is_not_killed_by_the_question() -> None:
    with living() as process:
        assert "has not installed" in request_stacks(entry_of("scorer", 0, process.pid))
        with pytest.raises(Exception, match="timed out"):
            process.wait(timeout=0.3)


def test_a_process_that_writes_no_stacks_is_said_to_even_if_its_log_grows(tmp_path: Path) -> None:
    log = tmp_path / "learner.log"
    handled = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: open(sys.argv[1], 'a').write('step 5')); "
    with living(handled + SLEEP, str(log)) as process:
        assert ask(entry_of("learner", 0, process.pid), log, wait_s=0.5).startswith("learner: no stacks within 0.5 s")
        assert log.read_text() == "step 5"


def test_a_process_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with living() as process:
        gone = entry_of("rollout", 1, process.pid)
    assert ask(gone, tmp_path / "rollout-1.log") == "rollout-1: it is gone"
