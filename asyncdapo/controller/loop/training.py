"""The training of a run whose processes are up: from step to step, and back to a checkpoint after a learner's death.

Train step k is `_train_step`: train on the batch taken, mark it trained while version k is published, tell replay.
    begins with  the initial model, or the checkpoint that `resume` found
    consumes     reports of the three kinds of processes
    produces     RUN_DIR/metrics.jsonl (one line a step), run.log, checkpoints (by the learner)
    waits for    a full batch (`stalls` says who waits for whom), hard deadlines elsewhere
    ends with    the last step, the end of the data, or a request to stop (`Stopped`)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncdapo import faults
from asyncdapo.accounting.spans import SpanFile
from asyncdapo.controller.checks.resume import Resume, survey
from asyncdapo.controller.eval.in_run import RunEvaluation, set_answers_aside
from asyncdapo.controller.fleet.process import Params, Pick, R, Watch
from asyncdapo.controller.fleet.ranks import together
from asyncdapo.controller.fleet.stalls import StallWatch
from asyncdapo.controller.fleet.training_fleet import TrainingFleet
from asyncdapo.controller.loop.background import BackgroundWork
from asyncdapo.controller.loop.checkpointing import Checkpointing
from asyncdapo.controller.loop.costs import Costs
from asyncdapo.controller.loop.forecast import Forecast
from asyncdapo.controller.loop.logprob_mismatch import LogprobMismatch
from asyncdapo.controller.loop.rank_metrics import of_ranks
from asyncdapo.controller.loop.step_metrics import StepMetrics, counters_of
from asyncdapo.controller.process.waits import NOBODY
from asyncdapo.errors import BatchError, RunError
from asyncdapo.learner.storage.checkpoint import set_aside
from asyncdapo.metrics.reporter import Reporter
from asyncdapo.replay.ledger.ledger import describe_unreadable

if TYPE_CHECKING:
    from asyncdapo.controller.roles.replay import ReplayProcess


class Training:
    """One run, with every process up."""

    def __init__(
        self, fleet: TrainingFleet, resume: Resume, reporter: Reporter, lines: StepMetrics, stalls: StallWatch
    ) -> None:
        self.fleet, self._resume, self._reporter, self._lines, self._stalls = fleet, resume, reporter, lines, stalls
        self._config = config = fleet.config
        self._run_dir = Path(config.run.dir)
        self._forecast = Forecast(config, fleet.placement)
        self._evaluation = RunEvaluation(
            config, fleet.opened, partial(fleet.replay.ask, lambda replay: replay.evaluate)
        )
        learners, prompts = fleet.learners, fleet.opened.probe_prompts
        self._parity = LogprobMismatch(config.rollout, learners, fleet.publishing, prompts, config.run.seed)
        self._evaluating = BackgroundWork(config.eval.every, config.run.steps)
        self._comparing = BackgroundWork(config.rollout.parity_every, config.run.steps)
        self._checkpoints = Checkpointing(fleet, stalls, resume.step)
        self._costs = Costs(fleet.placement, resume.last_line)
        self._span_file = SpanFile(self._run_dir, "controller")
        self.step = resume.step
        """Last train step that is done."""
        self._counters = counters_of({})
        """What the run has used up by `step`, for its checkpoints."""
        self.leasing = False
        """Prompts are leased, or have been: from then on the run directory holds somebody's work."""
        self._pausing: asyncio.Task[Any] | None = None

    def pause(self) -> None:
        """Have no more prompts leased."""
        if self.fleet.leasing:
            self.fleet.leasing = False
            self._pausing = asyncio.ensure_future(self.fleet.replay.ask(lambda replay: replay.pause))

    async def keep(self, say: Callable[[str], None]) -> None:
        """Keep what is done, so that the same command resumes from here: what is sampled of running groups, too. `say`
        is told what it waits for, whenever a checkpoint was copied and is being written."""
        if self.leasing:
            await self.fleet.replay.ask(lambda replay: replay.recall)
        await self._checkpoints.written(say)
        if self.leasing and self._checkpoints.step < self.step:
            await self._checkpoints.begin(self.step, self._counters)
            await self._checkpoints.written(say)

    def say_what_is_known(self) -> None:
        """Note what the replay server found in the prompts, and what the learner will need."""
        opened = self.fleet.opened
        if opened.num_left_out:
            self._reporter.note(f"prompts: {opened.num_left_out} are longer than prompts.max_prompt_length, left out")
        if opened.unknown:
            self._reporter.note(opened.unknown)
        for line in self._forecast.lines():
            self._reporter.note(line)

    async def run(self) -> None:
        """Train to the end; after each death of the learner again from its checkpoint."""
        death: RunError | None = None
        while True:
            life = Watch()
            try:
                if death:
                    await self._go_back(death)
                elif not self._resume.new:
                    self._roll_back_reports(self._resume, self.fleet.publishing.branch)
                    await self._publish_again(self._resume.step)
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
        await self._evaluating.cancel()
        await self._comparing.cancel()
        self._lines.write()
        resume = await asyncio.to_thread(survey, self._run_dir, self._config)
        for line in resume.describe():
            self._reporter.note(line)
        set_undone_aside(self._run_dir, resume.step)
        await self._checkpoints.go_back(resume.step)
        self.step = resume.step
        revival = self.fleet.revive_learner(death, resume.checkpoint)
        await self._stalls.wait(revival, whom=NOBODY, what="starts the learner again")
        branch = await self._replay(
            f"the rollback to step {resume.step}", lambda replay: replay.roll_back, resume.step, str(death)
        )
        self.fleet.publishing.learner_has(resume.step, branch)
        self._roll_back_reports(resume, branch)
        await self._publish_again(resume.step)

    def _roll_back_reports(self, resume: Resume, branch: int) -> None:
        """The ledger has gone back, and opened `branch`."""
        if unreadable := describe_unreadable(self._run_dir, branch):
            self._reporter.note(unreadable)
        self._reporter.roll_back(resume.step, branch, resume.missing_lines)

    async def _publish_again(self, step: int) -> None:
        """Give the workers the weights from which the run resumes."""
        await self._publish(step)
        await self._replay(f"the end of publishing version {step}", lambda replay: replay.published, step)

    async def _train(self) -> None:
        """Compare log-probs, evaluate, train to the last step or the end of the data, evaluate."""
        steps, no_batch = self._config.run.steps, ""
        self._comparing.begin(partial(self._parity.compare, self.step))
        await self._compared()
        if not self._lines.last:
            await self._evaluate_first()
        self.leasing = self.fleet.leasing = True
        await self._replay("the first leases", lambda replay: replay.begin)
        self._lines.begin()
        for step in range(self.step + 1, steps + 1):
            if no_batch := await self._take_batch(step):
                self._reporter.note(f"{self.step} of {steps} steps: {no_batch} (prompts.epochs)")
                break
            self._evaluating.check()
            await self._compared()
            self._lines.write()
            await self._train_step(step)
            if step < steps and not self.fleet.opened.data_ends:
                self._lines.write()
            self.fleet.totals = self._lines.last
        if self.step == 0:
            raise RunError(f"no batch was ever full: {no_batch}")
        await self._finish()

    async def _evaluate_first(self) -> None:
        await self._checkpoints.begin(0, self._counters)
        evaluated = await self._evaluate_alone("initial")
        self._lines.log_first({**self._comparing.take(), **self._checkpoints.take(), **evaluated})

    async def _train_step(self, step: int) -> None:
        """Train on the batch taken, mark it trained and publish the new version, keep the step's metrics line.

        Neither of the two in the middle needs the other: whatever dies between them, the newest checkpoint is of an
        earlier step, and the rollback to it undoes both. Whatever reads both, the checkpoint first, comes after them.
        """
        fleet, clock = self.fleet, self._lines.clock
        clock.enter("train")
        async with fleet.publishing.turn:
            trained = fleet.learners.call_each(lambda learner: learner.train_step)
            learner = of_ranks(await self._stalls.wait(trained, whom="learner", what=f"train step {step}"))
            fleet.publishing.learner_has(step, fleet.publishing.branch)
        faults.point("after_train")
        clock.enter("publish")
        weights, replay = await together(self._publish(step), self._account(step, learner))
        faults.point("after_publish")
        compared = self._comparing.after(step, partial(self._parity.compare, step))
        await self._replay(f"the end of publishing version {step}", lambda replay: replay.published, step)
        self.step, self._counters = step, counters_of(replay)
        clock.enter("checkpoint")
        if step % self._config.learner.checkpoint_every == 0:
            await self._checkpoints.begin(step, self._counters)
        clock.enter("report")
        if evaluated := self._evaluating.after(step, partial(self._evaluate_beside, step)):
            self._evaluation.belongs_to(step)
        up = (process.name for process in (*fleet.workers, *fleet.learners.ranks) if process.up.is_set())
        others = {**weights, **compared, **self._checkpoints.take(), **evaluated, **self._costs.metrics(replay, up)}
        self._lines.hold(step, learner, replay, **others)
        for line in self._forecast.compare(learner):
            self._reporter.note(line)
        self._span_file.write(
            steps=self._lines.steps.take(),
            states=clock.take_spans(),
            weights=fleet.publishing.sends.take(),
            waits=self._stalls.take_spans(),
        )

    async def _account(self, step: int, learner: dict[str, float]) -> dict[str, float]:
        """Have the replay server write that the step is done. Returns its metrics of it."""
        replay = await self._replay(f"the account of step {step}", lambda replay: replay.trained, step, learner)
        faults.point("after_trained")
        every = self._config.metrics.samples_every
        if every and step % every == 0:
            self._reporter.show_samples(
                await self._replay(f"samples of step {step}", lambda replay: replay.samples, step)
            )
        return replay

    async def _publish(self, step: int) -> dict[str, float]:
        """Send what the learner has, version `step`, to the workers. Returns the metrics of it."""
        return await self._stalls.wait(
            self.fleet.publishing.publish(), whom="rollout", what=f"version {step} to be loaded"
        )

    async def _take_batch(self, step: int) -> str:
        """Wait for batch `step`. Returns why there is none, once the data is used up; else nothing."""
        self._lines.clock.enter("wait")
        taken = self.fleet.learners.call_all(lambda learner: learner.take_batch, step)
        return await self._stalls.wait(taken, whom="learner", what=f"batch {step}", until_stopped=True)

    async def _finish(self) -> None:
        """Keep the final model, close the stream, then evaluate alone on all slots. An evaluation that still runs is
        given up: its line is written, and the final one asks the same prompts."""
        await self._evaluating.cancel()
        if self._checkpoints.step < self.step:
            await self._checkpoints.begin(self.step, self._counters)
        await self._checkpoints.written()
        await self._replay("the end of the stream", lambda replay: replay.finish)
        self.fleet.leasing = False
        await self._compared()
        evaluated = await self._evaluate_alone("final")
        self._lines.write_last({**self._comparing.take(), **self._checkpoints.take(), **evaluated})

    async def _evaluate_beside(self, step: int) -> dict[str, float]:
        """Evaluate while training continues, from the end of this step on."""
        evaluated = await self._evaluation.run(step, greedy=False)
        return {**evaluated, "eval/wall_s": self._lines.wall_at(time.monotonic())} if evaluated else {}

    async def _evaluate_alone(self, which: str) -> dict[str, float]:
        """Evaluate the `initial` or the `final` model while nothing else runs."""
        what = f"the evaluation of the {which} model"
        if self._config.eval.num_held_out:
            self._reporter.status(f"evaluating the {which} model")
        evaluation = self._evaluation.run(self.step, greedy=True)
        evaluated = await self._stalls.wait(evaluation, whom="replay", what=what, until_stopped=True)
        self._evaluation.belongs_to(self.step)
        return {**evaluated, "eval/wall_s": self._lines.wall_of(self.step)} if evaluated else {}

    async def _replay(
        self, what: str, pick: Pick[ReplayProcess, Params, R], *args: Params.args, **kwargs: Params.kwargs
    ) -> R:
        """Wait for the replay server's answer; its next life is asked again."""
        return await self._stalls.wait(self.fleet.replay.ask(pick, *args, **kwargs), whom="replay", what=what)

    async def _compared(self) -> None:
        """Wait until engines and learner are compared, while the learner still has the version."""
        if self._comparing.task:
            self._lines.clock.enter("parity")
            work = self._comparing.task
            await self._stalls.wait(work, whom="rollout", what="log-probs to compare", until_stopped=True)


def set_undone_aside(run_dir: Path, after_step: int) -> None:
    """Rename the checkpoints and answers of later steps, which a run that resumes from `after_step` leaves behind."""
    set_aside(run_dir, after_step)
    set_answers_aside(run_dir, after_step)
