"""The controller: wires the processes of a run together and takes it from step to step.

    ZeroMQ carries rollouts, Ray carries commands, NCCL (Gloo on CPU) carries weights.

         leases           scored groups      kept groups           batch k
    prompts ──▶ RolloutActor × N ──▶ filter ──▶ replay ──▶ LearnerActor
       ▲         ▲   (ZeroMQ, acked)   [ReplayActor]  (ZeroMQ)   │
       │         └──────── weights of version k (process group) ─┤
       └──────── lost, requeued, surplus prompts come back       │
                         Controller: train_step, publish, evaluate (Ray calls), metrics.jsonl

Train step k, one line a verb, is `_train_step`: take batch k, train, mark it trained, publish version k, tell replay.
    consumes   reports of the three kinds of processes
    produces   RUN_DIR/metrics.jsonl (one line a step), run.log, curve.png, checkpoints (by the learner)
    waits for  a full batch (says who waits for whom every `controller.report_wait_s`), hard deadlines elsewhere
    ends with  the last step, the end of the data, or the first watched process that ends before
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

from asyncdapo.config import Config, to_dict
from asyncdapo.controller.actors import LearnerActor, ReplayActor, RolloutActor
from asyncdapo.controller.evaluation import Evaluation
from asyncdapo.controller.processes import Process, Watch, gpu_shares, ray_session, reserve
from asyncdapo.controller.publishing import Publishing
from asyncdapo.errors import RunError, UserError
from asyncdapo.metrics.accounting import StateClock
from asyncdapo.metrics.curve import draw_curve
from asyncdapo.metrics.reporter import Reporter

T = TypeVar("T")

MAX_DROPPED_RATIO = 0.02
"""Share of groups dropped as stale above which a run says so."""


def launch(config: Config) -> int:
    """Run to the end. Returns the exit code: 0, 1 with the cause in the last lines, or 130 after Ctrl-C."""
    started = time.monotonic()
    reporter = Reporter(
        Path(config.run.dir), config.metrics, config.run.name, config.run.steps, settings=to_dict(config)
    )
    controller = Controller(config, reporter, started)
    try:
        reporter.status("starting Ray")
        with ray_session(config):
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; Ray has set its own by now
            asyncio.run(controller.run())
        return 0
    except RunError as error:
        if error.__cause__:
            traceback.print_exception(error.__cause__)
        reporter.status(f"the run ended: {error}")
        print(f"asyncdapo: the run ended: {error}", file=sys.stderr)
        return 1
    except UserError:
        if not controller.leasing:
            reporter.close()
            shutil.rmtree(config.run.dir)  # nothing was sampled: the corrected command may have the directory
        raise
    except KeyboardInterrupt:
        reporter.status("interrupted")
        return 130
    finally:
        reporter.close()


class Controller:
    """One run: its processes, its loop, its metrics."""

    def __init__(self, config: Config, reporter: Reporter, started: float) -> None:
        self.config, self.reporter, self.started = config, reporter, started
        self.watch = Watch()
        self.clock = StateClock(time.monotonic)
        self.evaluating: asyncio.Task[dict[str, float]] | None = None
        self.line: dict[str, float] = {}
        self.alarmed = False
        self.leasing = False
        """Whether prompts are leased, or have been: from then on the run directory holds somebody's work."""

    async def run(self) -> None:
        """Start, wire, train, evaluate, stop."""
        self.reporter.status("starting processes")
        await self.wire()
        await self.watch.guard(self.train())
        draw_curve(Path(self.config.run.dir))

    # ------------------------------------------------------------------------------------------------------- wiring

    async def wire(self) -> None:
        """The complete wiring: who exists, who talks to whom over what, and who is watched."""
        config = self.config

        # processes
        shares = gpu_shares(config, ray.cluster_resources().get("GPU", 0.0))
        room = await reserve([0.0, *shares], config.controller.place_timeout_s)
        start = partial(Process.start, room=room)
        self.replay = start(ReplayActor, "replay", config, place=0, threads=1)
        self.learner = start(LearnerActor, "learner", config, place=1, threads=config.learner.threads)
        self.workers = [
            start(RolloutActor, f"rollout-{i}", config, i, place=2 + i, threads=config.rollout.threads)
            for i in range(config.rollout.num_workers)
        ]

        # rollouts: ZeroMQ, workers -> replay -> learner
        self.opened = await self._within_start_timeout(self.replay.call("start"))
        await self._within_start_timeout(
            self.learner.call("start", self.opened.learner_address),
            *(worker.call("start", self.opened.rollout_address) for worker in self.workers),
        )

        # weights: a process group of their own
        self.publishing = Publishing(config.weights, self.learner, self.workers)
        await self.publishing.connect()

        # everything that must outlive the training
        for process in (self.replay, self.learner, *self.workers):
            self.watch.add(process.name, process.call("serve"))

        self.evaluation = Evaluation(
            config.eval,
            self.opened.eval_prompts,
            chunk=config.rollout.group_size,
            max_tokens=config.rollout.max_response_length,
            seed=config.run.seed,
            ask=partial(self.replay.call, "evaluate"),
        )

    async def _within_start_timeout(self, *calls: Coroutine[Any, Any, Any]) -> Any:
        """Answers of processes that load a model or open data; of one call its own."""
        timeout_s = self.config.controller.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                answers = await asyncio.gather(*calls)
        except TimeoutError:
            raise RunError(f"not every process is ready after controller.start_timeout_s ({timeout_s:g} s)") from None
        return answers[0]

    # --------------------------------------------------------------------------------------------------------- loop

    async def train(self) -> None:
        """Evaluate, train to the last step or the end of the data, evaluate."""
        steps = self.config.run.steps
        await self._patiently("the learner to save step 0", self.learner.call("save", 0))
        if self.opened.num_left_out:
            self.reporter.note(
                f"prompts: {self.opened.num_left_out} are longer than prompts.max_prompt_length, left out"
            )
        self.reporter.status("evaluating the initial model")
        first = await self._patiently("the first evaluation", self.evaluation.run(greedy=True, share=1.0))
        self.reporter.log({"step": 0, "time/wall_s": 0.0, "time/total_s": time.monotonic() - self.started, **first})

        self.leasing = True
        await self.replay.call("begin")
        self.began = self.line_at = time.monotonic()
        for step in range(1, steps + 1):
            if no_batch := await self._take_batch(step):
                self.reporter.note(f"no batch {step}: {no_batch}")
                break
            self._write_line()
            self.line = await self._train_step(step)
            if step < steps and not self.opened.data_ends:
                self._write_line()
        if not self.line:
            raise RunError(f"no batch was ever full: {no_batch}")
        self.line |= await self._finish(self.line["step"])
        self._write_line()

    async def _train_step(self, step: int) -> dict[str, float]:
        """Train on the batch taken, mark it trained, publish the new version; the metrics line of the step."""
        self.clock.enter("train")
        learner = await self._patiently(f"the learner to train step {step}", self.learner.call("train_step"))
        replay = await self.replay.call("trained", step, learner)
        self.clock.enter("publish")
        weights = await self._patiently(f"version {step} to reach the workers", self.publishing.publish(step))
        await self.replay.call("published", step)
        self.clock.enter("checkpoint")
        if step % self.config.learner.checkpoint_every == 0:
            await self._checkpoint(step)
        self.clock.enter("report")
        evaluated = self._evaluate_in_the_middle(step)
        self._alarm_about_drops(replay["replay/dropped_ratio"])
        return {"step": step, **self._times(learner, replay), **replay, **learner, **weights, **evaluated}

    async def _take_batch(self, step: int) -> str:
        """Wait for batch `step`. Returns why there is none, once the data is used up; else nothing."""
        self.clock.enter("wait")
        return await self._patiently(f"batch {step}", self.learner.call("take_batch", step))

    async def _checkpoint(self, step: int) -> None:
        await self._patiently(f"the learner to save step {step}", self.learner.call("save", step))
        await self.replay.call("covered", step)

    async def _finish(self, step: int) -> dict[str, float]:
        """Keep the final model, close the stream, then evaluate alone on all slots."""
        if step % self.config.learner.checkpoint_every:
            await self._checkpoint(step)
        await self.replay.call("finish")
        if self.evaluating:
            await self._patiently("an evaluation that runs", self.evaluating)
        self.reporter.status("evaluating the final model")
        final = await self._patiently("the final evaluation", self.evaluation.run(greedy=True, share=1.0))
        return {**final, "time/total_s": time.monotonic() - self.started}

    async def _patiently(self, what: str, work: Awaitable[T]) -> T:
        """Wait for work as long as it takes, but never in silence: who waits for whom is said again and again. An
        evaluation that fails meanwhile is raised here."""
        task = asyncio.ensure_future(work)
        since, report_s = time.monotonic(), self.config.controller.report_wait_s
        while not task.done():
            ends = {task} | ({self.evaluating} if self.evaluating and not self.evaluating.done() else set())
            done, _ = await asyncio.wait(ends, timeout=report_s, return_when=asyncio.FIRST_COMPLETED)
            if self.evaluating in done:
                self.evaluating.result()
            if not done:
                waited_s = time.monotonic() - since
                self.reporter.status(f"waiting for {what} since {waited_s:.0f} s: {await self._why_waiting()}")
        return task.result()

    async def _why_waiting(self) -> str:
        """What the replay server says, if it says anything."""
        try:
            async with asyncio.timeout(self.config.controller.report_wait_s):
                return (await self.replay.call("status"))["why_waiting"]
        except TimeoutError:
            return "the replay server does not answer"

    # ------------------------------------------------------------------------------------------------------- metrics

    def _write_line(self) -> None:
        """Write the line of the last step, unless it is written. One that may turn out to be the run's last is held
        back until that is known, since the final evaluation belongs into it."""
        if self.line:
            self.reporter.log(self.line)
            self.line = {}

    def _evaluate_in_the_middle(self, step: int) -> dict[str, float]:
        """Start an evaluation when one is due and none runs; the metrics of one that has finished since."""
        finished: dict[str, float] = {}
        if self.evaluating and self.evaluating.done():
            finished = self.evaluating.result()
            self.evaluating = None
        every, last = self.config.eval.every, self.config.run.steps
        if every and step % every == 0 and step < last and self.evaluating is None:
            share = self.config.eval.max_share
            self.evaluating = asyncio.ensure_future(self.evaluation.run(greedy=False, share=share))
        return finished

    def _alarm_about_drops(self, dropped_ratio: float) -> None:
        """Say it when many groups are dropped for their age: those that take long are the long answers."""
        if dropped_ratio > MAX_DROPPED_RATIO and not self.alarmed:
            self.alarmed = True
            self.reporter.note(
                f"replay warning: {dropped_ratio:.0%} of the groups were dropped as stale, long answers first: "
                "lower replay.run_ahead, raise replay.max_staleness, or set replay.on_stale=wait"
            )

    def _times(self, learner: dict[str, float], replay: dict[str, float]) -> dict[str, float]:
        """Clocks, and what each side did in the wall time since the last line."""
        now = time.monotonic()
        step_s, self.line_at = now - self.line_at, now
        times = self.clock.take()
        return {
            "time/wall_s": now - self.began,
            "time/total_s": now - self.started,
            "time/step_s": step_s,
            "rollout/tokens_per_s": replay["rollout/arrived_tokens"] / step_s,
            "learner/tokens_per_s": learner["learner/tokens"] / step_s,
            "learner/waiting_ratio": times["wait"] / step_s,
            **{f"controller/{state}_s": seconds for state, seconds in times.items()},
        }
