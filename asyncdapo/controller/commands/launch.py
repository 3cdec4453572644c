"""One launch of a run, from the command to its exit code.

In: a config that was checked, and what `resume` found in the run directory. Out: the exit code, with the cause in the
last lines where there is one. Whatever happens, the files are finished and no process is left (`reaper`). Does not own:
the checks before it (`preflight`), the run itself (`run`).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from asyncdapo import faults
from asyncdapo.config.config import Config, to_dict
from asyncdapo.controller.checks.resume import Resume
from asyncdapo.controller.loop.run import Controller
from asyncdapo.controller.process.ending import run_on_ray
from asyncdapo.controller.process.reaper import reaper
from asyncdapo.errors import EXIT_INTERRUPTED, UserError
from asyncdapo.metrics.reporter import Reporter
from asyncdapo.metrics.verdict.advice import keys_in_force


def launch(config: Config, resume: Resume) -> int:
    """Run to the end. Returns the exit code: 0, 1 with the cause in the last lines, or 130 after Ctrl-C."""
    with reaper():  # its sweep is the last thing, when the metrics are uploaded
        return _launch_watched(config, resume)


def _launch_watched(config: Config, resume: Resume) -> int:
    started, run_dir = time.monotonic(), Path(config.run.dir)
    reporter = Reporter(
        run_dir,
        config.metrics,
        config.run.name,
        config.run.steps,
        go_on=not resume.new,
        keys=keys_in_force(config),
        settings=to_dict(config),
    )
    faults.install("controller", config.faults, run_dir)
    controller = Controller(config, resume, reporter, started)
    try:
        resumes = "the same command repeats what came after the last checkpoint"
        code = run_on_ray(config, controller.run, reporter, what="the run", resumes=resumes)
        if controller.stopped:
            code = code or EXIT_INTERRUPTED
    except UserError:
        reporter.close()
        if resume.new and not controller.leasing:
            shutil.rmtree(run_dir)  # nothing was sampled: the corrected command may have the directory
        raise
    reporter.close()
    return code
