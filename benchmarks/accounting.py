"""What accounting costs: the operations of a step, timed one by one. `python -m benchmarks.accounting`"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from asyncdapo.accounting.clock import Level, SharedClock, StateClock
from asyncdapo.accounting.quantiles import quantiles
from asyncdapo.accounting.spans import Span, SpanFile
from asyncdapo.messages import Lease, Prompt
from asyncdapo.metrics.verdict.advice import KEYS
from asyncdapo.metrics.verdict.running_verdict import NUM_STEPS, RunningVerdict
from asyncdapo.rollout.account import WorkerAccount
from asyncdapo.rollout.job import Job
from tests.metrics.accounts_of import lines_of
from tests.rollout.fakes import FakeEngine

NUM_JOBS = 16
NUM_COMPLETIONS = 8192
NUM_VERDICTS = 200
NUM_SPANS = 1000


def microseconds(work: Callable[[], object], times: int = 20_000) -> float:
    """Of one call: the least of five means."""
    means = []
    for _ in range(5):
        began_s = time.perf_counter()
        for _ in range(times):
            work()
        means.append((time.perf_counter() - began_s) / times)
    return 1e6 * min(means)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))


def measure(run_dir: Path) -> None:
    clock, level, spans = StateClock(), Level(), SharedClock(("train",))
    spans.begin()

    def span() -> None:
        with spans.on("train"):
            pass

    prompt = Prompt(prompt_id=0, epoch=0, source="", row=0, token_ids=[1], text="", answer="")
    lease = Lease(lease_id=1, branch=0, number=1, attempt=1, group_size=16, seed=0, prompt=prompt)
    jobs = [Job(lease, 0, lambda: None) for _ in range(NUM_JOBS)]
    account = WorkerAccount(FakeEngine())
    verdict = RunningVerdict(dict.fromkeys(KEYS, 1.0))
    lines = iter(lines_of(5 * NUM_VERDICTS, loop={"wait": 0.5, "train": 0.5}, workers={"generate": 1.0}))
    lengths, states = list(range(NUM_COMPLETIONS)), cycle(("wait", "train"))
    written, file = [Span("train", at, at + 1.0) for at in range(NUM_SPANS)], SpanFile(run_dir, "replay")
    for what, work, times in (
        ("enter the state one is in", lambda: clock.enter("train"), 20_000),
        ("enter another state", lambda: clock.enter(next(states)), 20_000),
        (f"write {NUM_SPANS} spans", lambda: file.write(states=written), 200),
        ("open and close a span", span, 20_000),
        ("change a level", lambda: level.set(3), 20_000),
        (f"note what a worker does with {NUM_JOBS} jobs", lambda: account.note(jobs, 1), 20_000),
        ("a worker's gauges for a heartbeat", account.gauges, 20_000),
        (f"quantiles of {NUM_COMPLETIONS:,} lengths", lambda: quantiles(lengths), 200),
        (f"the verdict on {NUM_STEPS} steps", lambda: verdict.add(next(lines)), NUM_VERDICTS),
    ):
        print(f"{what:45} {microseconds(work, times):10.2f} µs")


if __name__ == "__main__":
    main()
