"""The Python tool: whatever a program does, the model is told, and nothing of it is left."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from asyncdapo.environment import python_tool
from asyncdapo.environment.python_tool import PythonTool, is_right, run_program
from asyncdapo.model.tool_calls import ToolCall
from tests.asynchronous import asynchronous
from tests.environment.hosting import hosting, scripted

PATH = "asyncdapo.environment.python_tool:PythonTool"


def started_by(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ASYNCDAPO_CHILD") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


@asynchronous
async def test_a_program_is_run_and_its_output_is_what_the_model_reads() -> None:
    calls = [ToolCall("python", {"code": code}) for code in ("print(6 * 7)", "x = 1", "1 / 0", "print(")]
    async with hosting(PATH) as hosts:
        said = await hosts.in_environment({"answer": "42"}, scripted(calls, "It is \\boxed{42}."))
    results = [message["content"] for message in said[1]]
    assert results[:2] == ["42", "[it printed nothing]"]
    assert "ZeroDivisionError: division by zero" in results[2]
    assert results[2].endswith("[ended with exit code 1]")
    assert "SyntaxError" in results[3]
    assert said[2:] == [None, 1.0, {"programs": 4}]


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("while True: pass", "took more than"),
        ("import time; time.sleep(60)", "took more than"),
        ("while True: print('x' * 1000)", "[cut off]"),
        ("x = bytearray(1 << 40)", "MemoryError"),
        ("open('big', 'wb').write(b'x' * (1 << 22))", "ended with exit code"),
        ("import os\nfor _ in range(9): os.fork()\nimport time; time.sleep(60)", "took more than"),
        ("import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(60)\nprint('gone')", "gone"),
        ("import os; os.kill(os.getpid(), 9)", ""),
        ("import os; print(sorted(set(os.environ) - {'ASYNCDAPO_CHILD', 'LC_CTYPE'}))", "[]"),
        ("import sys; print(repr(sys.stdin.read()))", "''"),
        ("import os; print(os.listdir())", "[]"),
        ("print('\\ud800')", "UnicodeEncodeError"),
        ("[open('/dev/null') for _ in range(100)]", "Too many open files"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "Error"),
    ],
)
@asynchronous
async def test_a_hostile_program_ends_within_its_limits_and_leaves_nothing(
    program: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("ASYNCDAPO_CHILD", mark)
    monkeypatch.setattr(python_tool, "WALL_S", 1.0 if told == "took more than" else 20.0)
    assert told in await run_program(program)
    deadline = time.monotonic() + 20
    while (left := started_by(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [process for process in left if process.pid != os.getpid()]
    assert not left


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("\\boxed{42}", "42", True),
        ("so \\boxed{41}, no: \\boxed{1,042.0}", "1042", True),
        ("It is 42", "42", True),
        ("42 or 43", "42", False),
        ("\\boxed{1/2}", "0.5", True),
        ("\\boxed{}", "42", False),
        ("1/0", "42", False),
        ("none", "none", False),
    ],
)
def test_the_last_number_counts(response: str, answer: str, right: bool) -> None:
    assert is_right(response, answer) is right


def test_the_environment_offers_one_tool() -> None:
    assert PythonTool().step("42") == (None, 0.0)
