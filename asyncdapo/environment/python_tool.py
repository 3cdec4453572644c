"""An environment: questions with a number as their answer, and Python as a tool.
`environment.path=asyncdapo.environment.python_tool:PythonTool`

A response without a tool call is the last. It is right if the number in its last `\\boxed{…}` is the answer; without a
box, its last number. Each program runs in a process of its own (`sandbox`), with limits on its time, memory, files,
processes and output.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

SANDBOX = Path(__file__).with_name("sandbox.py")
WALL_S = 10.0
CPU_S = 5
MEMORY_BYTES = 1 << 29
FILE_BYTES = 1 << 20
MAX_OUTPUT_BYTES = 4000
KEPT_VARIABLES = ("ASYNCDAPO_CHILD",)
"""By which a host's processes are found, whatever becomes of it. The model's programs see no others."""
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


class PythonTool:
    """One episode."""

    def __init__(self) -> None:
        self._answer = ""
        self._num_programs = 0

    def reset(self, row: dict[str, Any]) -> None:
        self._answer = row["answer"]

    async def python(self, code: str) -> str:
        """Run a Python program and return what it prints. Each program starts anew, without files and network.

        Args:
            code: The program. It prints what you want to know.
        """
        self._num_programs += 1
        return await run_program(code)

    def step(self, response: str) -> tuple[None, float]:
        return None, float(is_right(response, self._answer))

    def metrics(self) -> dict[str, float]:
        return {"programs": self._num_programs}


def is_right(response: str, answer: str) -> bool:
    """Whether the response's last number is the answer's."""
    boxes = BOXED.findall(response)
    said, wanted = (number_in(text) for text in (boxes[-1] if boxes else response, answer))
    return said is not None and said == wanted


def number_in(text: str) -> Fraction | None:
    """Its last number."""
    numbers = NUMBER.findall(text)
    try:
        return Fraction(numbers[-1].replace(",", "")) if numbers else None
    except (ValueError, ZeroDivisionError):
        return None


async def run_program(code: str) -> str:
    """What it printed, errors included, and how it ended if it didn't end well."""
    limits = map(str, (CPU_S, MEMORY_BYTES, FILE_BYTES))
    with tempfile.TemporaryDirectory(prefix="asyncdapo-") as folder, tempfile.TemporaryFile() as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(SANDBOX), *limits),
            stdin=asyncio.subprocess.PIPE,
            stdout=output,  # a file, which FILE_BYTES bounds: a pipe stays open as long as any process has it
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        )
        assert process.stdin is not None
        try:
            async with asyncio.timeout(WALL_S):
                process.stdin.write(code.encode(errors="replace"))
                process.stdin.close()
                end = _describe(await process.wait())
        except TimeoutError:
            end = f"[ended: it took more than {WALL_S:g} s]"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        output.seek(0)
        printed = output.read(MAX_OUTPUT_BYTES + 1)
    text = printed[:MAX_OUTPUT_BYTES].decode(errors="replace")
    cut = "[cut off]" if len(printed) > MAX_OUTPUT_BYTES else ""
    return "\n".join(filter(None, [text.rstrip(), cut, end])) or "[it printed nothing]"


def _describe(code: int) -> str:
    return f"[ended with exit code {code}]" if code else ""
