"""The evaluations of a run: first, last and in between, each with its answers under the step of its metrics line.

    RUN_DIR/eval/step-000012          answers, metrics and page (`answers`) of the evaluation in the line of step 12
                 undone-step-000012   of a step that a rollback undid

In: held-out prompts, what the rollout workers answer. Out: `eval/…` metrics, these folders. An evaluation in the middle
of a run ends in a step that nobody knows when it begins: its folder gets a name when its line is put together.
Invariant: a folder named after a step is whole. Does not own: when to evaluate (the controller), the metrics
(`evaluation`), what stands in the files (`answers`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from asyncdapo.config.config import Config
from asyncdapo.controller.eval.answers import AnswerFiles
from asyncdapo.controller.eval.evaluation import Ask, Evaluation
from asyncdapo.controller.roles.opening import Opened
from asyncdapo.disk import disk_errors
from asyncdapo.learner.storage.checkpoint import STEP_NAME

ENDED = "ended"
"""A whole evaluation whose step isn't known yet."""


class RunEvaluation:
    """One evaluation at a time, over and over."""

    def __init__(self, config: Config, opened: Opened, ask: Ask) -> None:
        self._evaluation = Evaluation.of(config, opened.eval_prompts, ask)
        self._name, self._keep = config.run.name, config.eval.keep_answers
        self._folder = folder(Path(config.run.dir))
        self._prompts, self._texts = opened.eval_prompts, opened.eval_texts
        self._has_ended = False
        """There are answers that no step has yet."""

    async def run(self, step: int, *, greedy: bool) -> dict[str, float]:
        """Evaluate, from the end of train step `step` on. Returns the metrics. Raises DiskError."""
        if not (self._keep and self._evaluation.total(greedy=greedy)):
            return await self._evaluation.run(greedy=greedy)
        title = f"{self._name}, evaluation begun after step {step}"
        files = AnswerFiles(self._folder / ENDED, self._prompts, self._texts, title)
        files.open(keep=False)
        try:
            metrics = await self._evaluation.run(greedy=greedy, on_answers=files.append)
            await files.close(metrics)
        except BaseException:
            files.give_up()
            raise
        self._has_ended = True
        return metrics

    def belongs_to(self, step: int) -> None:
        """The metrics of the evaluation that ended last stand in the line of this step."""
        if self._has_ended:
            self._has_ended = False
            with disk_errors(self._folder):
                _rename(self._folder / ENDED, self._folder / f"step-{step:06d}")


def folder(run_dir: Path) -> Path:
    """Where the evaluations of a run lie."""
    return run_dir / "eval"


def set_answers_aside(run_dir: Path, after_step: int) -> None:
    """Rename the answers of later steps, which a run that resumes from `after_step` leaves behind. Raises DiskError."""
    with disk_errors(folder(run_dir)):
        for left in sorted(folder(run_dir).glob("step-*")):
            match = STEP_NAME.fullmatch(left.name)
            if match and int(match[1]) > after_step:
                _rename(left, left.with_name(f"undone-{left.name}"))


def _rename(old: Path, new: Path) -> None:
    """What is there under the new name makes room."""
    if new.exists():
        shutil.rmtree(new)
    old.rename(new)
