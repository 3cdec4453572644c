"""What is kept of the train steps of a rank besides its metrics: what it did when, log-probs of samples, profiles.

In: train steps, the rank's clock and waits. Out: files in the run directory. Invariant: no gradient depends on it. Does
not own: what is in the files (`accounting/spans`, `learner/storage/sample_logprobs`, `learner/storage/profiler`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncdapo.accounting.clock import SharedClock
from asyncdapo.controller.roles.base import ProcessBase
from asyncdapo.learner.step.gradient import Note
from asyncdapo.learner.storage.profiler import StepProfiler
from asyncdapo.learner.storage.sample_logprobs import SampleLogprobs
from asyncdapo.replay.ledger.kept import FOLDER
from asyncdapo.shares import Batch


class StepObserver:
    """Of one rank."""

    def __init__(self, process: ProcessBase) -> None:
        config, self._process = process.config, process
        self._run_dir, self._num_samples = Path(config.run.dir), config.metrics.keep_samples
        self._profiler = StepProfiler(config.learner.profile_steps, self._run_dir, process.spec.name)

    @contextmanager
    def on(self, batch: Batch) -> Iterator[Note]:
        """The body trains on this batch, and tells of every pass with gradient."""
        samples = SampleLogprobs(batch, self._num_samples)
        with self._profiler.on(batch.step):
            yield samples.note
        if samples.found:
            samples.write(self._run_dir / FOLDER, self._process.spec.name)

    def write_spans(self, clock: SharedClock) -> None:
        """A step is over. `clock`: what the rank's time goes into."""
        self._process.span_file.write(states=clock.take_spans(), waits=self._process.waits.take_spans())
