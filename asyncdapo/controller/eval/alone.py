"""One evaluation as a run of its own: replay server and rollout workers, no learner.

         requests                    responses, verdicts
    eval ────────▶ replay ──▶ rollout[N] ──▶ replay ──▶ answers.jsonl, as they arrive
                                                             └─▶ at the end metrics.json, page.html

In: the configuration of an evaluation, and OUT, which this process holds. Out: the files of `answers`. Processes live,
die, are started again and are said to hang as in any run (`fleet`, `stalls`). The ledger of the replay server holds
nothing that anybody could miss: it goes away at the end, and one that a killed command left before the start.
Invariant: an answer that has arrived is on disk, so the same command resumes with what is missing.
Does not own: what is asked (`evaluation`), whether this is the same evaluation (`record`).
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from asyncdapo import faults
from asyncdapo.config.config import Config
from asyncdapo.controller.eval.answers import AnswerFiles
from asyncdapo.controller.eval.evaluation import Answered, Evaluation, unjudged
from asyncdapo.controller.eval.progress import EvalProgress
from asyncdapo.controller.fleet.fleet import Fleet
from asyncdapo.controller.fleet.process import Watch
from asyncdapo.controller.fleet.stalls import StallWatch
from asyncdapo.controller.fleet.supervisor import Supervisor
from asyncdapo.controller.process.ending import run_on_ray
from asyncdapo.controller.process.ray_servers import death as ray_death
from asyncdapo.controller.process.reaper import reaper
from asyncdapo.controller.process.waits import NOBODY
from asyncdapo.controller.roles.opening import Opened, Start
from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from asyncdapo.records.record import PAYLOAD_FOLDER
from asyncdapo.replay.ledger.ledger import LEDGER_FILE
from asyncdapo.replay.server.failures import MIN_FAILED

CONTROLLER_LOG = "controller.log"


def evaluate(config: Config, step: int) -> int:
    """Ask for what is missing, to the end. `step`: version of the weights. Returns the exit code: 0, 1 with the cause
    in the last line, or 130 after Ctrl-C."""
    out = Path(config.run.dir)
    _remove_ledger(out)
    faults.install("controller", config.faults, out)
    with reaper():
        progress = EvalProgress(out / "logs" / CONTROLLER_LOG)
        try:
            main = EvalRun(config, step, progress).run
            resumes = "the same command resumes with what is missing"
            return run_on_ray(config, main, progress, what="the evaluation", resumes=resumes)
        finally:
            progress.close()
            _remove_ledger(out)


class EvalRun:
    """Its processes, and the answers that they give."""

    def __init__(self, config: Config, step: int, progress: EvalProgress) -> None:
        self._config, self._step, self._progress = config, step, progress
        self._supervisor = Supervisor(config)
        self._stalls = StallWatch(config.controller, self._supervisor, progress)

    async def run(self) -> None:
        """Start, ask, write, stop."""
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        for sent in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sent, main.cancel)
        watch = Watch()
        watch.add("Ray", ray_death(self._config.controller.ray_address))
        await watch.guard(self._run(watch))

    async def _run(self, watch: Watch) -> None:
        self._progress.status("starting processes")
        starting = Fleet.start(self._config, self._supervisor, Start())
        fleet = await self._stalls.wait(starting, whom=NOBODY, what="starts processes")
        fleet.watch(watch)
        opened = fleet.opened
        self._say_what_is_missing(opened)
        answers = AnswerFiles(
            Path(self._config.run.dir), opened.eval_prompts, opened.eval_texts, title=self._config.run.name
        )
        known = answers.open(keep=True)
        try:
            await answers.close(await self._ask_for(fleet, answers, known))
        except BaseException:
            answers.give_up()
            raise

    async def _ask_for(self, fleet: Fleet, answers: AnswerFiles, known: list[Answered]) -> dict[str, float]:
        evaluation = Evaluation.of(self._config, fleet.opened.eval_prompts, partial(self._ask, fleet))
        total = evaluation.total(greedy=True)
        if known:
            self._progress.note(f"resumes: {len(known):,} of {total:,} answers are there")
        self._progress.status("evaluating")
        self._progress.begin(total, known)

        arrived = asyncio.Event()
        here = [one.answer for one in known]

        def take(answered: Sequence[Answered]) -> None:
            answers.append(answered)
            self._progress.answered(answered)
            here.extend(replace(one.answer, response="") for one in answered)
            fails_now = len(here) < total and any(one.answer.failed for one in answered)
            if fails_now and sum(answer.failed for answer in here) >= MIN_FAILED:
                self._check_judged(here)
            arrived.set()

        work = evaluation.run(greedy=True, known=known, on_answers=take)
        metrics = await self._while_answers_arrive(work, arrived)
        self._check_judged(here)
        return metrics

    def _check_judged(self, answers: Sequence[EvalAnswer]) -> None:
        """A judge that is down gives no numbers. Those that weren't judged are asked for again."""
        allowed = self._config.reward.max_failure_ratio
        if sum(answer.failed for answer in answers) > allowed * len(answers):
            raise RunError(f"reward.max_failure_ratio allows {allowed:.0%}, and {unjudged(answers)}")

    async def _while_answers_arrive(self, work: Coroutine[Any, Any, dict[str, float]], arrived: asyncio.Event) -> Any:
        """The result of `work`. Every answer begins a wait of its own: as long as they come, nobody has to be told who
        waits for whom."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                arrived.clear()
                one = asyncio.ensure_future(arrived.wait())
                either = asyncio.wait({task, one}, return_when=asyncio.FIRST_COMPLETED)
                try:
                    await self._stalls.wait(either, whom="replay", what="the next answers")
                finally:
                    one.cancel()
            return task.result()
        finally:
            task.cancel()

    async def _ask(self, fleet: Fleet, requests: list[EvalRequest]) -> list[EvalAnswer]:
        """What the workers answer. They have loaded a model and know of no step: its version is the checkpoint's."""
        answers = await fleet.replay.ask(lambda replay: replay.evaluate, requests)
        of_step = partial(replace, version_min=self._step, version_max=self._step)
        return [of_step(answer) for answer in answers]

    def _say_what_is_missing(self, opened: Opened) -> None:
        """Rows whose prompt is too long are asked nowhere, and so count neither as right nor as wrong."""
        if opened.unknown:
            self._progress.note(opened.unknown)
        if num := opened.num_eval_left_out:
            limit = self._config.prompts.max_prompt_length
            self._progress.note(f"left out: {num:,} rows, longer than prompts.max_prompt_length ({limit} tokens)")


def _remove_ledger(out: Path) -> None:
    for path in out.glob(f"{Path(LEDGER_FILE).stem}.*"):
        path.unlink()
    shutil.rmtree(out / PAYLOAD_FOLDER, ignore_errors=True)
