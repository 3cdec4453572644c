"""How a command that trains or evaluates ends: its exit code, and the last lines with the cause.

In: the coroutine of the command. Out: the exit code. Invariant: a RunError is one line on stderr, the last one; the
traceback of a defect comes before it; any other error is raised. Does not own: what to do with files and directories
after it.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from asyncdapo.config.config import Config
from asyncdapo.controller.process.ray_session import ray_session
from asyncdapo.errors import EXIT_INTERRUPTED, RunError
from asyncdapo.metrics.reporter import View


def run_on_ray(
    config: Config, main: Callable[[], Coroutine[Any, Any, None]], view: View, *, what: str, resumes: str
) -> int:
    """Run `main` in a Ray session. Returns 0, 1 after a RunError, or 130 after Ctrl-C or SIGTERM. `what`: name of the
    command in the message of an error. `resumes`: what the same command does after an interruption."""
    try:
        view.status("starting Ray")
        with ray_session(config):
            asyncio.run(main())
        return 0
    except RunError as error:
        if error.__cause__ and not isinstance(error.__cause__, RunError):
            traceback.print_exception(error.__cause__)
        view.status(f"{what} ended: {error}")
        print(f"asyncdapo: {what} ended: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError, SystemExit):  # Ray raises the last on SIGTERM while it starts
        view.status(f"interrupted: {resumes}")
        return EXIT_INTERRUPTED
