"""A run in simulated time: the real core of replay, an engine and a learner of known speed.

In: a `Load`, the sections `replay` and `filter`, a seed. Out: how long the steps took, how stale the data was, which
answers were trained on. Only `ReplayState` is the product's: engine, learner and clock are models.

    engine    one worker; all running sequences advance at the same pace, `Load.tokens_per_s`, which falls as more run
    learner   asks for batch k + 1 when step k begins, as the real one does; trains, publishes, begins the next step

Does not own: what a load stands for (`loads.py`), tables (`pacing.py`).
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.state import ReplayState
from benchmarks.paced.loads import Load


def bias(trained: list[int], sampled: list[int]) -> float:
    """Kolmogorov–Smirnov: the largest difference of the two distributions."""
    trained, sampled = sorted(trained), sorted(sampled)
    values = sorted({*trained, *sampled})
    return max(
        abs(bisect_right(trained, value) / len(trained) - bisect_right(sampled, value) / len(sampled))
        for value in values
    )


@dataclass
class Running:
    """A lease at the worker."""

    prompt_id: int
    to_start: deque[int]
    """Lengths of the sequences that have no slot yet."""
    num_open: int
    """Sequences that aren't done."""
    started_version: int | None = None


@dataclass
class Result:
    """Of one simulated run. Seconds are simulated."""

    wall_s: float = 0.0
    waited_s: float = 0.0
    """The learner, for a batch."""
    staleness: list[int] = field(default_factory=list)
    """Of each trained group."""
    run_aheads: list[float] = field(default_factory=list)
    """In force, at each step."""
    trained: list[int] = field(default_factory=list)
    """Prompts."""
    dropped: list[int] = field(default_factory=list)
    """Prompts that ended for staleness."""

    @property
    def mean_staleness(self) -> float:
        return sum(self.staleness) / len(self.staleness)


class Simulation:
    """One run. `load` may change while it goes on."""

    def __init__(self, load: Load, replay: ReplayConfig, filter: FilterConfig, seed: int) -> None:
        self.load, self.state = load, ReplayState(replay, filter, max_attempts=3, num_prompts=None)
        self.result = Result()
        self._seed = seed
        self._now, self._version = 0.0, 0
        self._depth = 0.0
        """Tokens that a sequence has by now which has run since the start."""
        self._slots: list[tuple[float, int]] = []
        """Depth at which a running sequence is done, and its lease."""
        self._leases: dict[int, Running] = {}
        self._queue: deque[int] = deque()
        """Leases with sequences that have no slot yet."""
        self._step, self._has_batch, self._trains_until, self._waits_since = 0, False, math.inf, 0.0
        self._tell(core.WorkerJoined(worker=0, loaded_version=0))
        self._tell(core.BatchWanted(step=1))
        self._fill()

    def run(self, steps: int) -> Result:
        """Train until this many steps are done."""
        while self._step < steps or self._trains_until < math.inf:
            self._advance(steps)
        self.result.wall_s = self._now
        return self.result

    def answers(self, prompt_id: int) -> tuple[list[int], tuple[float, ...]]:
        """Lengths and verdicts of the answers to a prompt: the same however often and whenever it is sampled."""
        return self.load.answers(random.Random(f"{self._seed} {prompt_id}"))

    def lengths(self) -> tuple[list[int], list[int]]:
        """Of the answers trained on, and of all that the filter keeps, of the prompts before the first without an
        end."""
        ended, trained = min(self.state.prompts.unended), set(self.result.trained)
        answers = {prompt_id: self.answers(prompt_id) for prompt_id in range(ended)}
        kept = {prompt_id: lengths for prompt_id, (lengths, verdicts) in answers.items() if len(set(verdicts)) > 1}
        of_trained = [length for prompt_id, lengths in kept.items() if prompt_id in trained for length in lengths]
        return of_trained, [length for lengths in kept.values() for length in lengths]

    # ------------------------------------------------------------------------------------------------------- time

    def _advance(self, steps: int) -> None:
        """To the next thing that happens: a sequence is done, or the learner is."""
        pace = self.load.tokens_per_s(len(self._slots))
        done_s = self._now + (self._slots[0][0] - self._depth) / pace if self._slots else math.inf
        if done_s == self._trains_until == math.inf:
            raise RuntimeError("nothing happens any more")
        if done_s < self._trains_until:
            self._now, self._depth = done_s, self._slots[0][0]
            self._finish_sequence(heapq.heappop(self._slots)[1])
        else:
            self._depth += (self._trains_until - self._now) * pace
            self._now = self._trains_until
            self._finish_step()
        self._fill()
        if self._has_batch and self._trains_until == math.inf and self._step < steps:
            self._begin_step()

    def _begin_step(self) -> None:
        self._step, self._has_batch = self._step + 1, False
        self.result.waited_s += self._now - self._waits_since
        self.result.run_aheads.append(self.state.admission.run_ahead)
        train_s = self.load.train_s * random.Random(f"{self._seed} step {self._step}").lognormvariate(
            0, self.load.jitter
        )
        self._trains_until = self._now + train_s
        self._tell(core.BatchWanted(step=self._step + 1))

    def _finish_step(self) -> None:
        self._version = self._step
        self._tell(core.Trained(step=self._step))
        self._tell(core.WeightsLoaded(worker=0, version=self._version))
        self._tell(core.Published(version=self._version))
        self._trains_until, self._waits_since = math.inf, self._now

    # ----------------------------------------------------------------------------------------------------- engine

    def _finish_sequence(self, lease_id: int) -> None:
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        lease.num_open -= 1
        if lease.num_open:
            return
        del self._leases[lease_id]
        assert lease.started_version is not None
        self._tell(
            core.GroupArrived(
                lease_id=lease_id,
                min_version=lease.started_version,
                max_version=self._version,
                metrics={"acc": self.answers(lease.prompt_id)[1]},
                num_loss_tokens=1,
            )
        )

    def _fill(self) -> None:
        """Start what there is, and ask for as many leases as the free slots can start, until there are none."""
        while True:
            self._start_sequences()
            free = self.load.slots - len(self._slots)
            before = self.state.leases.num_granted
            self._tell(core.Ready(worker=0, credits=-(-free // self.load.group_size)))
            if self.state.leases.num_granted == before:
                return

    def _start_sequences(self) -> None:
        while self._queue and len(self._slots) < self.load.slots:
            lease_id = self._queue[0]
            lease = self._leases.get(lease_id)
            if lease is None or not lease.to_start:
                self._queue.popleft()
                continue
            if lease.started_version is None:
                lease.started_version = self._version
                self._tell(core.SamplingBegan(lease_id=lease_id, version=self._version))
            heapq.heappush(self._slots, (self._depth + lease.to_start.popleft(), lease_id))

    # ------------------------------------------------------------------------------------------------------- core

    def _tell(self, event: core.Event) -> None:
        for action in self.state.handle(event):
            match action:
                case core.GrantLease():
                    lengths, _ = self.answers(action.prompt_id)
                    self._leases[action.lease_id] = Running(action.prompt_id, deque(lengths), len(lengths))
                    self._queue.append(action.lease_id)
                case core.EndLease(outcome="withdrawn"):
                    self._leases.pop(action.lease_id, None)
                    self._slots = [slot for slot in self._slots if slot[1] != action.lease_id]
                    heapq.heapify(self._slots)
                case core.CutBatch():
                    self._has_batch = True
                    self.result.staleness += action.staleness
                case core.MovePrompt(state="trained"):
                    self.result.trained.append(action.prompt_id)
                case core.MovePrompt(state="expired"):
                    self.result.dropped.append(action.prompt_id)
                case _:
                    pass
