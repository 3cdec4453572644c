"""The files of one evaluation: every answer, what they come to, and a page to read them.

    DIR/answers.jsonl   one line a completion (`lines`), in the order in which they arrived
        metrics.json    the `eval/…` metrics; written when all answers are there
        page.html       the same answers to read in a browser (`page`)

In: answers as they arrive. Out: these files; of an evaluation that was interrupted, the answers that it has. Raises
DiskError. Invariant: metrics.json stands in DIR only beside all the answers it is made of. An evaluation that may be
resumed writes in DIR from the start; any other has a name of its own until it is whole, so that no half one is taken
for it. Does not own: what is asked, the metrics (`evaluation`).
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from asyncdapo.controller.eval.evaluation import Answered
from asyncdapo.controller.eval.lines import AnswerLine, cut_torn_line, encode, read_lines
from asyncdapo.controller.eval.page import render
from asyncdapo.disk import disk_errors, replace_file
from asyncdapo.errors import UserError
from asyncdapo.messages import Prompt

ANSWERS_FILE = "answers.jsonl"
METRICS_FILE = "metrics.json"
PAGE_FILE = "page.html"


class AnswerFiles:
    """Those of one directory, of an evaluation of these prompts."""

    def __init__(self, directory: Path, prompts: Sequence[Prompt], texts: Sequence[str], title: str = "") -> None:
        """`texts`: the prompts as the model reads them. `title`: of the page, else the directory's name."""
        self._final = self._directory = directory
        self._prompts = {prompt.prompt_id: (prompt, text) for prompt, text in zip(prompts, texts, strict=True)}
        self._title = title or directory.name
        self._file: IO[bytes] | None = None

    def open(self, keep: bool) -> list[Answered]:
        """Begin to write. With `keep` add to what is there. That is returned, but for answers that could not be judged,
        which are removed. Else begin anew, beside what may be there until `close`. Raises UserError when these are
        answers to other prompts."""
        if not keep:
            self._directory = self._final.with_name(f".{self._final.name}.new")
        with disk_errors(self._directory):
            if not keep and self._directory.exists():
                shutil.rmtree(self._directory)
            self._directory.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, PAGE_FILE):  # of fewer answers than there will be
                (self._directory / name).unlink(missing_ok=True)
            known = [self._known(line) for line in read_lines(self._path)]
            if any(one.answer.failed for one in known):
                judged = [encode(line) for line in read_lines(self._path) if not line.failed]
                replace_file(self._path, b"".join(judged))
                known = [one for one in known if not one.answer.failed]
            self._file = self._path.open("ab")
            cut_torn_line(self._path)
        return known

    def append(self, answered: Sequence[Answered]) -> None:
        """Keep these, whatever becomes of this process."""
        assert self._file is not None, "`open` comes first"
        with disk_errors(self._path):
            for one in answered:
                prompt, text = self._prompts[one.answer.prompt_id]
                self._file.write(encode(AnswerLine.of(one, prompt, text)))
            self._file.flush()

    async def close(self, metrics: Mapping[str, float]) -> None:
        """All answers are there: write what they come to, and the page, which takes seconds and so has a thread. When
        this is cancelled the thread may still put a page into a directory that was given up, and nothing else."""
        assert self._file is not None, "`open` comes first"
        with disk_errors(self._directory):
            self._file.close()
            await asyncio.to_thread(self._write_page, metrics)
            replace_file(self._directory / METRICS_FILE, msgspec.json.format(msgspec.json.encode(metrics)) + b"\n")
            if self._directory != self._final:
                if self._final.exists():
                    shutil.rmtree(self._final)
                self._directory.rename(self._final)

    def give_up(self) -> None:
        """It won't be whole. What was begun anew is removed, what can be resumed stays."""
        assert self._file is not None, "`open` comes first"
        with suppress(OSError):  # what a full disk refused before it refuses again, and that is said already
            self._file.close()
        if self._directory != self._final:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _write_page(self, metrics: Mapping[str, float]) -> None:
        replace_file(self._directory / PAGE_FILE, render(self._title, lambda: read_lines(self._path), metrics))

    @property
    def _path(self) -> Path:
        return self._directory / ANSWERS_FILE

    def _known(self, line: AnswerLine) -> Answered:
        prompt, text = self._prompts.get(line.prompt_id, (None, None))
        if prompt is None or (line.prompt, line.answer) != (text, prompt.answer):
            fix = "choose another directory, or remove this one"
            raise UserError(
                f"{self._path}: holds answers to other prompts, such as {line.source} row {line.row} ({fix})"
            )
        return line.answered()
