"""The controller: takes a run from step to step, back to its checkpoint after a learner's death, and to its end.

    ZeroMQ carries rollouts, Ray carries commands, NCCL (Gloo on CPU) carries weights.

         leases           scored groups      kept groups           batch k
    prompts ──▶ RolloutActor × N ──▶ filter ──▶ replay ──▶ LearnerActor × M ranks
       ▲         ▲   (ZeroMQ, acked)   [ReplayActor]  (ZeroMQ)   │
       │         └──────── weights of version k (process group) ─┤ rank 0
       └──────── lost, requeued, surplus prompts come back       │
                         Controller: train_step, publish, evaluate (Ray calls), metrics.jsonl

Train step k is `_train_step`: train on the batch taken, mark it trained while version k is published, tell replay.
    begins with  the initial model, or the checkpoint that `resume` found
    consumes     reports of the three kinds of processes
    produces     RUN_DIR/metrics.jsonl (one line a step), run.log, curve.png, checkpoints (by the learner)
    waits for    a full batch (`watchdog` says who waits for whom), hard deadlines elsewhere
    ends with    the last step, the end of the data, a request to stop, or the first watched task that ends before
"""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asyncdapo import faults
from asyncdapo.config.config import Config
from asyncdapo.controller.checks.resume import Resume, survey
from asyncdapo.controller.eval.in_run import RunEvaluation, set_answers_aside
from asyncdapo.controller.fleet.process import Params, Pick, R, Watch
from asyncdapo.controller.fleet.ranks import together
from asyncdapo.controller.fleet.training_fleet import TrainingFleet
from asyncdapo.controller.fleet.watchdog import Patience, Stopped
from asyncdapo.controller.loop.background import Aside
from asyncdapo.controller.loop.forecast import Forecast
from asyncdapo.controller.loop.inside_step import InsideStep
from asyncdapo.controller.loop.logprob_mismatch import Parity
from asyncdapo.controller.loop.step_metrics import Lines, counters_of
from asyncdapo.controller.process.ray_servers import death as ray_death
from asyncdapo.controller.process.waits import NOBODY
from asyncdapo.controller.roles.opening import Start
from asyncdapo.errors import BatchError, RunError
from asyncdapo.learner.step.checkpoint import oldest_kept, set_aside
from asyncdapo.metrics.reporter import Reporter
from asyncdapo.replay.ledger.ledger import describe_unreadable

if TYPE_CHECKING:
    from asyncdapo.controller.roles.learner import LearnerProcess
    from asyncdapo.controller.roles.replay import ReplayProcess


class Controller:
    """One run: its loop, its metrics, its end."""

    def __init__(self, config: Config, resume: Resume, reporter: Reporter, started: float) -> None:
        self.config, self.resume = config, resume
        self.run_dir = Path(self.config.run.dir)
        self.reporter = reporter
        self.lines = Lines(reporter, resume.first_line, resume.last_line, started)
        self.fleet = TrainingFleet(self.config)
        self.fleet.on_filling = InsideStep(reporter, config.replay.prompts_per_step, config.run.steps).heed
        self.patience = Patience(self.config.controller, self.fleet, reporter)
        self.watch = Watch()
        last_step = config.run.steps
        self.evaluating = Aside(config.eval.every, last_step)
        self.comparing = Aside(config.rollout.parity_every, last_step)
        self.step = self.saved = resume.step
        """Last train step that is done, and last one with a checkpoint."""
        self.counters = counters_of({})
        """What the run has used up by `step`, for its checkpoints."""
        self.stopped = self.leasing = False
        """`leasing`: prompts are leased, or have been: from then on the run directory holds somebody's work."""

    async def run(self) -> None:
        """Start, train, evaluate, stop."""
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        for sent in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sent, self._heed_signal, main)
        self.watch.add("Ray", ray_death(self.config.controller.ray_address))
        await self.watch.guard(self._run())
        from asyncdapo.metrics.curve import draw_curve  # matplotlib takes its time

        curve = os.path.relpath(draw_curve(self.run_dir))
        if not self.stopped:
            self.reporter.note(f"the curve: {curve}; to evaluate: asyncdapo eval {os.path.dirname(curve)}")

    def _heed_signal(self, main: asyncio.Task[None]) -> None:
        """The first asks the run to stop, the second or `run.stop_s` ends it as it is."""
        if self.patience.stopping.is_set():
            main.cancel()
            return
        stop_s = self.config.run.stop_s
        self.reporter.note(f"stopping after this step, within {stop_s:g} s; once more ends the run at once")
        self.patience.stopping.set()
        if self.fleet.leasing:
            self.fleet.leasing = False
            self.pausing = asyncio.ensure_future(self.fleet.replay.ask(lambda replay: replay.pause))
        asyncio.get_running_loop().call_later(stop_s, main.cancel)

    async def _run(self) -> None:
        try:
            await self._start()
            await self._outlive_learners()
        except Stopped:
            self.stopped = True
            await self._leave()

    # ------------------------------------------------------------------------------------------- beginnings and ends

    async def _start(self) -> None:
        """Every process, from the beginning or from the checkpoint."""
        config, resume = self.config, self.resume
        for line in () if resume.new else resume.describe():
            self.reporter.note(line)
        self.reporter.status("starting processes")
        self._set_aside(resume.step)
        start = Start() if resume.new else Start(roll_back_to=resume.step, reason="resumed", totals=resume.last_line)
        await self.patience.wait(
            self.fleet.start(start, resume.checkpoint), whom=NOBODY, what="starts processes", until_stopped=True
        )
        self.fleet.watch(self.watch)
        if not resume.new:
            self._roll_back_reports(resume, self.fleet.publishing.branch)
        if self.fleet.opened.num_left_out:
            self.reporter.note(
                f"prompts: {self.fleet.opened.num_left_out} are longer than prompts.max_prompt_length, left out"
            )
        if self.fleet.opened.unknown:
            self.reporter.note(self.fleet.opened.unknown)
        fleet, config = self.fleet, self.fleet.config  # with what follows from who has a GPU
        self.forecast = Forecast(config, fleet.placement)
        for line in self.forecast.lines():
            self.reporter.note(line)
        self.evaluation = RunEvaluation(config, fleet.opened, partial(fleet.replay.ask, lambda replay: replay.evaluate))
        self.parity = Parity(
            config.rollout,
            fleet.workers,
            fleet.learners.first,
            fleet.publishing,
            fleet.opened.probe_prompts,
            config.run.seed,
        )

    async def _leave(self) -> None:
        """Keep what is done, so that the same command goes on from here."""
        if self.leasing and self.saved < self.step:
            await self._checkpoint(self.step)
        self.lines.write()
        self.reporter.status(f"stopped after step {self.step}: the same command goes on from there")

    async def _outlive_learners(self) -> None:
        """Train to the end; after each death of the learner again from its checkpoint."""
        death: RunError | None = None
        while True:
            life = Watch()
            try:
                if death:
                    await self._go_back(death)
                elif not self.resume.new:
                    await self._publish_again(self.resume.step)
                for rank in self.fleet.learners.ranks:
                    life.add(rank.name, rank.call(lambda rank: rank.serve))
                return await life.guard(self._train())
            except RunError as error:
                if not (isinstance(error, BatchError) or self.fleet.learners.ended_by(error)):
                    raise
                await self.fleet.end_learner()
                death = error

    async def _go_back(self, death: RunError) -> None:
        """The learner is gone, and with it all that came after its last checkpoint."""
        self.evaluating.cancel()
        self.comparing.cancel()
        self.lines.write()
        resume = await asyncio.to_thread(survey, self.run_dir, self.config)
        for line in resume.describe():
            self.reporter.note(line)
        self._set_aside(resume.step)
        self.step = self.saved = resume.step
        revival = self.fleet.revive_learner(death, resume.checkpoint)
        await self.patience.wait(revival, whom=NOBODY, what="starts the learner again")
        branch = await self._replay(
            f"the rollback to step {resume.step}", lambda replay: replay.roll_back, resume.step, str(death)
        )
        self.fleet.publishing.learner_has(resume.step, branch)
        self._roll_back_reports(resume, branch)
        await self._publish_again(resume.step)

    def _roll_back_reports(self, resume: Resume, branch: int) -> None:
        """The ledger has gone back, and opened `branch`."""
        if unreadable := describe_unreadable(self.run_dir, branch):
            self.reporter.note(unreadable)
        self.reporter.roll_back(resume.step, branch, resume.missing_lines)

    def _set_aside(self, after_step: int) -> None:
        set_aside(self.run_dir, after_step)
        set_answers_aside(self.run_dir, after_step)

    async def _publish_again(self, step: int) -> None:
        """Give the workers the weights that the run goes on from."""
        await self._publish(step)
        await self._replay(f"the end of publishing version {step}", lambda replay: replay.published, step)

    # --------------------------------------------------------------------------------------------------------- loop

    async def _train(self) -> None:
        """Compare log-probs, evaluate, train to the last step or the end of the data, evaluate."""
        steps, no_batch = self.config.run.steps, ""
        self.comparing.begin(partial(self.parity.compare, self.step))
        await self._compared()
        if not self.lines.last:
            await self._evaluate_first()
        self.leasing = self.fleet.leasing = True
        await self._replay("the first leases", lambda replay: replay.begin)
        self.lines.begin()
        for step in range(self.step + 1, steps + 1):
            if no_batch := await self._take_batch(step):
                self.reporter.note(f"{self.step} of {steps} steps: {no_batch} (prompts.epochs)")
                break
            self.evaluating.check()
            await self._compared()
            self.lines.write()
            await self._train_step(step)
            if step < steps and not self.fleet.opened.data_ends:
                self.lines.write()
            self.fleet.totals = self.lines.last
        if self.step == 0:
            raise RunError(f"no batch was ever full: {no_batch}")
        await self._finish()

    async def _evaluate_first(self) -> None:
        await self._checkpoint(0)
        evaluated = await self._evaluate_alone("initial")
        self.lines.log_first({**self.comparing.take(), **evaluated})

    async def _train_step(self, step: int) -> None:
        """Train on the batch taken, mark it trained and publish the new version, keep the step's metrics line.

        Neither of the two in the middle needs the other: whatever dies between them, the newest checkpoint is of an
        earlier step, and the rollback to it undoes both. Whatever reads both, the checkpoint first, comes after them.
        """
        fleet, clock = self.fleet, self.lines.clock
        clock.enter("train")
        async with fleet.publishing.turn:
            learner = await self._learners(f"train step {step}", lambda learner: learner.train_step)
            fleet.publishing.learner_has(step, fleet.publishing.branch)
        faults.point("after_train")
        clock.enter("publish")
        weights, replay = await together(self._publish(step), self._account(step, learner))
        faults.point("after_publish")
        compared = self.comparing.after(step, partial(self.parity.compare, step))
        await self._replay(f"the end of publishing version {step}", lambda replay: replay.published, step)
        self.step, self.counters = step, counters_of(replay)
        clock.enter("checkpoint")
        if step % self.config.learner.checkpoint_every == 0:
            await self._checkpoint(step)
        clock.enter("report")
        evaluate = partial(self.evaluation.run, step, greedy=False, share=self.config.eval.max_share)
        if evaluated := self.evaluating.after(step, evaluate):
            self.evaluation.belongs_to(step)
        self.lines.hold(step, learner, replay, **weights, **compared, **evaluated)
        for line in self.forecast.compare(learner):
            self.reporter.note(line)

    async def _account(self, step: int, learner: dict[str, float]) -> dict[str, float]:
        """Have the replay server write that the step is done. Returns its metrics of it."""
        replay = await self._replay(f"the account of step {step}", lambda replay: replay.trained, step, learner)
        faults.point("after_trained")
        return replay

    async def _publish(self, step: int) -> dict[str, float]:
        """Send what the learner has, version `step`, to the workers. Returns the metrics of it."""
        return await self.patience.wait(
            self.fleet.publishing.publish(), whom="rollout", what=f"version {step} to be loaded"
        )

    async def _take_batch(self, step: int) -> str:
        """Wait for batch `step`. Returns why there is none, once the data is used up; else nothing."""
        self.lines.clock.enter("wait")
        taken = self.fleet.learners.call_all(lambda learner: learner.take_batch, step)
        return await self.patience.wait(taken, whom="learner", what=f"batch {step}", until_stopped=True)

    async def _checkpoint(self, step: int) -> None:
        await self._learners("the ranks' weights to be compared", lambda learner: learner.check_ranks)
        branch, counters = self.fleet.publishing.branch, self.counters
        saved = self.fleet.learners.first.call(lambda learner: learner.save, step, branch, counters)
        await self.patience.wait(saved, whom="learner", what=f"checkpoint of step {step}")
        self.saved = step
        faults.point("after_checkpoint")
        await self._replay(f"the end of checkpoint {step}", lambda replay: replay.covered, oldest_kept(self.run_dir))

    async def _finish(self) -> None:
        """Keep the final model, close the stream, then evaluate alone on all slots."""
        if self.saved < self.step:
            await self._checkpoint(self.step)
        await self._replay("the end of the stream", lambda replay: replay.finish)
        self.fleet.leasing = False
        await self._compared()
        if self.evaluating.task:
            await self.patience.wait(self.evaluating.task, whom="replay", what="an evaluation", until_stopped=True)
        evaluated = await self._evaluate_alone("final")
        self.lines.write_last({**self.comparing.take(), **evaluated})

    async def _evaluate_alone(self, which: str) -> dict[str, float]:
        """Evaluate the `initial` or the `final` model while nothing else runs."""
        what = f"the evaluation of the {which} model"
        if self.config.eval.num_held_out:
            self.reporter.status(f"evaluating the {which} model")
        evaluation = self.evaluation.run(self.step, greedy=True, share=1.0)
        evaluated = await self.patience.wait(evaluation, whom="replay", what=what, until_stopped=True)
        self.evaluation.belongs_to(self.step)
        return evaluated

    async def _learners(
        self, what: str, pick: Pick[LearnerProcess, Params, R], *args: Params.args, **kwargs: Params.kwargs
    ) -> R:
        """Wait for every rank of the learner. Returns what rank 0 answers."""
        return await self.patience.wait(self.fleet.learners.call_all(pick, *args, **kwargs), whom="learner", what=what)

    async def _replay(
        self, what: str, pick: Pick[ReplayProcess, Params, R], *args: Params.args, **kwargs: Params.kwargs
    ) -> R:
        """Wait for the replay server's answer; its next life is asked again."""
        return await self.patience.wait(self.fleet.replay.ask(pick, *args, **kwargs), whom="replay", what=what)

    async def _compared(self) -> None:
        """Wait until engines and learner are compared, while the learner still has the version."""
        if self.comparing.task:
            self.lines.clock.enter("parity")
            work = self.comparing.task
            await self.patience.wait(work, whom="rollout", what="log-probs to compare", until_stopped=True)
