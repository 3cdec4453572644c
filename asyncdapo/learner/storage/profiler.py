"""`learner.profile_steps`: torch's profiler over some train steps of a rank.

In: train steps. Out: RUN_DIR/profile/learner-0-steps-3-4.json once the last of them is over, for ui.perfetto.dev: every
operation on CPU and GPU. If the process dies before, there is none; the next life begins with the first of these steps
that it trains. Does not own: what all processes do when (`asyncdapo trace`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile

FOLDER = "profile"


class StepProfiler:
    """Of one rank. All steps have to be in one thread."""

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, name: str) -> None:
        """`steps`: the first and the last. `name`: of the process."""
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._run_dir, self._name = run_dir, name
        self._profile: profile | None = None

    @contextmanager
    def on(self, step: int) -> Iterator[None]:
        """The body is this train step."""
        if step in self._steps and self._profile is None:
            self._profile = profile()
            self._profile.start()
        yield
        if self._profile and step == self._steps[-1]:
            self._profile.stop()
            path = self._run_dir / FOLDER / f"{self._name}-steps-{self._steps[0]}-{self._steps[-1]}.json"
            path.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(path))
            self._profile = None
