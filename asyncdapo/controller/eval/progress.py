"""How far an evaluation is: a bar on a terminal, a line now and then elsewhere.

    4:12  answers 384/960  accuracy 0.443  12,340 tok/s

In: answers as they arrive, the current status, notes. Out: standard output, and lines in OUT/logs/controller.log. tok/s
counts the tokens of answers that arrived in this command, accuracy sampled answers as long as there are any. Does not
own: the table at the end (`command`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asyncdapo.controller.eval.evaluation import Answered
from asyncdapo.metrics.progress import ProgressLines
from asyncdapo.metrics.reporter import listen
from asyncdapo.metrics.terminal import terminal_of

LINE_EVERY_S = 10.0
"""Between two lines where there is no terminal."""


class EvalProgress:
    """Of one command. A `View` for what the controller has to say."""

    def __init__(self, log_file: Path, stream: TextIO | None = None) -> None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log = log_file.open("a", encoding="utf-8")
        console = terminal_of(stream or sys.stdout)
        self._bar = _bar(console) if console else None
        lines = ProgressLines(self._log, 0)
        self._lines = [lines] if self._bar else [lines, ProgressLines(stream or sys.stdout, 0)]
        self._handler = listen(self)
        self._num_total = self._num_done = self._num_tokens = 0
        self._verdicts: dict[bool, list[float]] = {False: [], True: []}
        """Of sampled answers and of greedy ones."""
        self._began = self._said_at = time.monotonic()
        if self._bar:
            self._task = self._bar.add_task("starting", total=None, shown="")
            self._bar.start()

    def status(self, text: str) -> None:
        """What goes on or is waited for now."""
        for lines in self._lines:
            lines.status(text)
        if self._bar:
            self._bar.update(self._task, description=text)

    def note(self, text: str) -> None:
        """Something that happened."""
        for lines in self._lines:
            lines.note(text)
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)

    def begin(self, num_total: int, known: Sequence[Answered]) -> None:
        """So many answers are asked for, and these are there already."""
        self._num_total, self._began = num_total, time.monotonic()
        self._count(known)
        self._num_tokens = 0
        if self._bar:
            self._bar.update(self._task, description="answers", total=num_total)
            self._show()

    def answered(self, answers: Sequence[Answered]) -> None:
        """These have arrived."""
        self._count(answers)
        if self._bar:
            self._show()
        elif time.monotonic() >= self._said_at + LINE_EVERY_S or self._num_done == self._num_total:
            self._said_at = time.monotonic()
            self.note(f"answers {self._num_done:,}/{self._num_total:,}  {self._numbers()}")

    def close(self) -> None:
        """Leave the last picture standing."""
        logging.getLogger().removeHandler(self._handler)
        if self._bar:
            self._bar.stop()
        self._log.close()

    def _count(self, answers: Sequence[Answered]) -> None:
        self._num_done += len(answers)
        self._num_tokens += sum(one.answer.num_tokens for one in answers)
        for one in answers:
            self._verdicts[one.greedy].append(one.answer.acc)

    def _numbers(self) -> str:
        rate = self._num_tokens / max(time.monotonic() - self._began, 1e-9)
        verdicts = self._verdicts[False] or self._verdicts[True]
        return f"accuracy {fmean(verdicts):.3f}  {rate:,.0f} tok/s" if verdicts else ""

    def _show(self) -> None:
        assert self._bar is not None, "without a bar there are lines"
        self._bar.update(self._task, completed=self._num_done, shown=self._numbers())


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
