"""The controller: starts a run, has it trained, and ends it.

    ZeroMQ carries rollouts, Ray carries commands, NCCL (Gloo on CPU) carries weights.

         leases           scored groups      kept groups           batch k
    prompts ──▶ RolloutActor × N ──▶ filter ──▶ replay ──▶ LearnerActor × M ranks
       ▲         ▲   (ZeroMQ, acked)   [ReplayActor]  (ZeroMQ)   │
       │         └──────── weights of version k (process group) ─┤ rank 0
       └──────── lost, requeued, surplus prompts come back       │
                         Controller: train_step, publish, evaluate (Ray calls), metrics.jsonl

In: a config that was checked, and what `resume` found. Out: RUN_DIR/run.log, curve.png, and all that `training` writes.
It ends with the training, a request to stop, or the first watched task that ends before. Does not own: the train loop
(`training`), the exit code (`commands/launch`).
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from asyncdapo.config.config import Config
from asyncdapo.controller.checks.resume import Resume
from asyncdapo.controller.fleet.process import Watch
from asyncdapo.controller.fleet.stalls import StallWatch, Stopped
from asyncdapo.controller.fleet.supervisor import Supervisor
from asyncdapo.controller.fleet.training_fleet import TrainingFleet
from asyncdapo.controller.loop.inside_step import InsideStep
from asyncdapo.controller.loop.step_metrics import StepMetrics
from asyncdapo.controller.loop.training import Training, set_undone_aside
from asyncdapo.controller.process.ray_servers import death as ray_death
from asyncdapo.controller.process.waits import NOBODY
from asyncdapo.controller.roles.opening import Start
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.metrics.reporter import Reporter
from asyncdapo.metrics.verdict.advice import keys_in_force
from asyncdapo.metrics.verdict.running_verdict import final_words


class Controller:
    """One launch of a run: its start, its end, its answer to signals."""

    def __init__(self, config: Config, resume: Resume, reporter: Reporter, started: float) -> None:
        self._config, self._resume, self._reporter = config, resume, reporter
        self._run_dir = Path(config.run.dir)
        self._keys = keys_in_force(config)
        self._lines = StepMetrics(reporter, resume.first_line, resume.last_line, started, self._keys)
        self._supervisor = Supervisor(config)
        self._stalls = StallWatch(config.controller, self._supervisor, reporter)
        self._watch = Watch()
        self._training: Training | None = None
        """None until every process is up."""
        self._ends: asyncio.TimerHandle | None = None
        """When a run that was asked to stop ends as it is."""
        self.stopped = False

    @property
    def leasing(self) -> bool:
        """Whether prompts are leased, or have been: from then on the run directory holds somebody's work."""
        return self._training is not None and self._training.leasing

    async def run(self) -> None:
        """Start, train, evaluate, stop."""
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        for sent in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sent, self._handle_signal, main)
        self._watch.add("Ray", ray_death(self._config.controller.ray_address))
        await self._watch.guard(self._run())
        for line in final_words(read_metrics(self._run_dir), self._keys):
            self._reporter.note(line)
        from asyncdapo.metrics.curve import draw_curve  # matplotlib takes its time

        curve = os.path.relpath(draw_curve(self._run_dir))
        if not self.stopped:
            self._reporter.note(f"the curve: {curve}; to evaluate: asyncdapo eval {os.path.dirname(curve)}")

    def _handle_signal(self, main: asyncio.Task[None]) -> None:
        """The first asks the run to stop, the second ends it as it is. So does `run.stop_s` without a copy of what is
        done, and again without its writing."""
        if self._stalls.stopping.is_set():
            main.cancel()
            return
        stop_s = self._config.run.stop_s
        self._reporter.note(f"stopping after this step, within {stop_s:g} s; once more ends the run at once")
        self._stalls.stopping.set()
        if self._training:
            self._training.pause()
        self._ends = asyncio.get_running_loop().call_later(stop_s, main.cancel)

    def _wait_for(self, what: str) -> None:
        """The copy is made: its writing, whose time depends on the model's size, has `run.stop_s` of its own."""
        main, stop_s = asyncio.current_task(), self._config.run.stop_s
        assert main is not None
        self._reporter.note(f"waits for {what}, within {stop_s:g} s; once more ends the run at once")
        if self._ends:
            self._ends.cancel()
        self._ends = asyncio.get_running_loop().call_later(stop_s, main.cancel)

    async def _run(self) -> None:
        try:
            self._training = await self._start()
            await self._training.run()
        except Stopped:
            self.stopped = True
            await self._leave()

    async def _start(self) -> Training:
        """Every process, from the beginning or from the checkpoint."""
        config, resume, reporter = self._config, self._resume, self._reporter
        for line in () if resume.new else resume.describe():
            reporter.note(line)
        reporter.status("starting processes")
        set_undone_aside(self._run_dir, resume.step)
        start = Start() if resume.new else Start(roll_back_to=resume.step, reason="resumed", totals=resume.last_line)
        starting = TrainingFleet.start(config, self._supervisor, start, resume.checkpoint)
        fleet = await self._stalls.wait(starting, whom=NOBODY, what="starts processes", until_stopped=True)
        fleet.watch(self._watch, InsideStep(reporter, config.replay.prompts_per_step, config.run.steps).show)
        training = Training(fleet, resume, reporter, self._lines, self._stalls)
        training.say_what_is_known()
        return training

    async def _leave(self) -> None:
        """Keep what is done, so that the same command resumes from here."""
        step = self._resume.step
        if self._training:
            await self._training.keep(self._wait_for)
            step = self._training.step
        self._lines.write()
        self._reporter.status(f"stopped after step {step}: the same command resumes from there")
