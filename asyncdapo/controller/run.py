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
import sys
import time
import traceback
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import ray

from asyncdapo.config import Config, to_dict
from asyncdapo.controller.actors import LearnerActor, ReplayActor, RolloutActor
from asyncdapo.controller.evaluation import Evaluation
from asyncdapo.controller.processes import Process, Watch, gpus_per_process, ray_session, reserve
from asyncdapo.controller.publishing import Publishing
from asyncdapo.errors import RunError
from asyncdapo.metrics.accounting import StateClock
from asyncdapo.metrics.curve import draw_curve
from asyncdapo.metrics.reporter import Reporter


def launch(config: Config) -> int:
    """Run to the end. Returns the exit code: 0, 1 with the cause in the last lines, or 130 after Ctrl-C."""
    started = time.monotonic()
    reporter = Reporter(
        Path(config.run.dir), config.metrics, config.run.name, config.run.steps, settings=to_dict(config)
    )
    try:
        reporter.status("starting Ray")
        with ray_session(config):
            asyncio.run(Controller(config, reporter, started).run())
        return 0
    except RunError as error:
        if error.__cause__:
            traceback.print_exception(error.__cause__)
        reporter.status(f"the run ended: {error}")
        print(f"asyncdapo: the run ended: {error}", file=sys.stderr)
        return 1
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
        num_workers = config.rollout.num_workers
        gpus = gpus_per_process(config, ray.cluster_resources().get("GPU", 0.0))
        room = await reserve([0.0] + [gpus] * (1 + num_workers), config.controller.place_timeout_s)
        start = partial(Process.start, room=room)
        self.replay = start(ReplayActor, "replay", config, place=0, threads=1)
        self.learner = start(LearnerActor, "learner", config, place=1, threads=config.learner.threads)
        self.workers = [
            start(RolloutActor, f"rollout-{i}", config, i, place=2 + i, threads=config.rollout.threads)
            for i in range(num_workers)
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
        await self.learner.call("save", 0)
        self.reporter.status("evaluating the initial model")
        first = await self.evaluation.run(greedy=True, share=1.0)
        self.reporter.log({"step": 0, "time/wall_s": 0.0, "time/total_s": time.monotonic() - self.started, **first})

        await self.replay.call("begin")
        self.began = self.line_at = time.monotonic()
        for step in range(1, steps + 1):
            if not await self._take_batch(step):
                break
            self._write_line()
            self.line = await self._train_step(step)
            if step < steps and not self.opened.data_ends:
                self._write_line()
        if not self.line:
            raise RunError("the data was used up before the first batch was full: more rows, or more prompts.epochs")
        self.line |= await self._finish(self.line["step"])
        self._write_line()

    async def _train_step(self, step: int) -> dict[str, float]:
        """Train on the batch taken, mark it trained, publish the new version; the metrics line of the step."""
        self.clock.enter("train")
        learner = await self.learner.call("train_step", step)
        replay = await self.replay.call("trained", step, learner)
        self.clock.enter("publish")
        weights = await self.publishing.publish(step)
        await self.replay.call("published", step)
        self.clock.enter("checkpoint")
        if step % self.config.learner.checkpoint_every == 0:
            await self._checkpoint(step)
        self.clock.enter("report")
        evaluated = self._evaluate_in_the_middle(step)
        return {"step": step, **self._times(learner, replay), **replay, **learner, **weights, **evaluated}

    async def _take_batch(self, step: int) -> bool:
        """Wait for batch `step`, saying who waits for whom; False when the data is used up."""
        self.clock.enter("wait")
        taking = asyncio.ensure_future(self.learner.call("take_batch", step))
        since = time.monotonic()
        while not (await asyncio.wait([taking], timeout=self.config.controller.report_wait_s))[0]:
            why = (await self.replay.call("status"))["why_waiting"]
            self.reporter.status(f"learner waits for batch {step} since {time.monotonic() - since:.0f} s: {why}")
        return await taking

    async def _checkpoint(self, step: int) -> None:
        await self.learner.call("save", step)
        await self.replay.call("covered", step)

    async def _finish(self, step: int) -> dict[str, float]:
        """Keep the final model, close the stream, then evaluate alone on all slots."""
        if step % self.config.learner.checkpoint_every:
            await self._checkpoint(step)
        await self.replay.call("finish")
        if self.evaluating:
            await self.evaluating
        self.reporter.status("evaluating the final model")
        final = await self.evaluation.run(greedy=True, share=1.0)
        return {**final, "time/total_s": time.monotonic() - self.started}

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
