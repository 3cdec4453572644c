"""The ends of a transfer of weights: calls to all of them, with one deadline.

In: a call for each end. Out: their answers, or the first error. Invariants: no call is left behind but that of a silent
worker; an end that gives no answer by the deadline is killed, and the fleet starts it again. Until an end answers, the
controller waits for it, and says for what.

A worker whose process says nothing at all (stopped, or its node is gone) doesn't cost the others the deadline. Whoever
still owes an answer is asked every `ASK_S` whether it is there. If it says nothing for `FEW` times as long as transfers
take, `SILENT_S` at least, the transfer goes on without it: it is left out until it answers again or dies. Before the
first transfer nobody knows how long one takes; then it may say nothing for `FIRST_SHARE` of the deadline. Does not own:
what is sent to whom, and what a worker that was left out is sent later (`publishing`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from asyncdapo.controller.fleet.process import Process, ProcessDied
from asyncdapo.controller.process.waits import Waits
from asyncdapo.errors import EngineError, RunError, WeightsError

if TYPE_CHECKING:
    from asyncdapo.controller.roles.learner import LearnerProcess
    from asyncdapo.controller.roles.rollout import RolloutProcess

R = TypeVar("R")
Owed = asyncio.Task[Any]
"""The call of an end that owes an answer."""

COMMAND_MARGIN_S = 10.0
"""What a command may take beyond the transfer's own timeout before it counts as failed."""
ASK_S = 0.5
"""Between two questions to an end that owes an answer."""
SILENT_S = 2.0
FEW = 4
FIRST_SHARE = 0.1
NUM_TRANSFERS = 8
"""Latest ones, whose median says how long one takes."""

log = logging.getLogger("weights")


class SilentWorker(WeightsError):  # noqa: N818 - what happened to it, not a failure of ours
    """A worker, or several, said nothing during a transfer."""


class Ends:
    """The learner's ranks and the workers, whoever takes part."""

    def __init__(self, waits: Waits, timeout_s: float, workers: Sequence[Process[RolloutProcess]]) -> None:
        """`waits`: the controller's. `timeout_s`: of a transfer. `workers`: all that there may be."""
        self._waits, self._timeout_s, self._workers = waits, timeout_s, workers
        self._took_s: deque[float] = deque(maxlen=NUM_TRANSFERS)
        self._owed: dict[str, Owed] = {}
        """The call of each worker that was left out."""
        self._left_out: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def note_transfer(self, seconds: float) -> None:
        """One has succeeded."""
        self._took_s.append(seconds)

    def is_silent(self, worker: Process[RolloutProcess]) -> bool:
        """Whether it was left out, and still owes the answer."""
        return worker.name in self._owed and not self._owed[worker.name].done()

    async def until_heard(self, worker: Process[RolloutProcess]) -> None:
        """Until it answers, or is dead; at once unless it was left out."""
        if self.is_silent(worker):
            await asyncio.wait([self._owed[worker.name]])

    async def until_left_out(self, worker: Process[RolloutProcess]) -> None:
        """Until it is left out, or was since the last call."""
        await self._left_out[worker.name].wait()
        self._left_out[worker.name].clear()

    async def answers(
        self,
        what: str,
        calls: Mapping[Process[Any], Coroutine[Any, Any, R]],
        sender: Process[LearnerProcess] | Process[RolloutProcess],
        deadline_s: float | None = None,
    ) -> list[R]:
        """All answers, in the order of `calls`. After a failure everybody leaves the group, so that no other call lasts
        longer; then the first error is raised, a death before any other. `deadline_s`: by default a transfer's."""
        deadline_s = deadline_s or self._timeout_s + COMMAND_MARGIN_S
        tasks = {asyncio.ensure_future(_outcome(process, call)): process for process, call in calls.items()}
        for task in tasks:  # of one that is left out nobody takes the outcome, nor when this is cancelled
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        waits = [asyncio.ensure_future(self._wait(task, tasks[task].name, what, deadline_s)) for task in tasks]
        first = asyncio.ensure_future(asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))
        silence = asyncio.ensure_future(self._silence(tasks))
        errors: list[Exception] = []
        leaving: list[asyncio.Task[None]] = []
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    await asyncio.wait({first, silence}, return_when=asyncio.FIRST_COMPLETED)
                    if silence.done():
                        errors.append(self._leave_out({task: tasks.pop(task) for task in silence.result()}))
                    leaving = [asyncio.ensure_future(leave) for leave in self._leaves(sender, tasks)]
                    if tasks:
                        await asyncio.wait(tasks)
        finally:
            late = [task for task in tasks if not task.done()]
            for task in (*late, first, silence, *leaving, *waits):
                task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        errors += [answer for answer in answers if isinstance(answer, Exception)]
        errors += [_kill(tasks[task], what, deadline_s) for task in late]
        for error in sorted(errors, key=lambda error: not isinstance(error, ProcessDied)):
            raise error
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def _leaves(self, sender: Process[Any], tasks: Mapping[Owed, Process[Any]]) -> Iterator[Coroutine[Any, Any, None]]:
        """Have those who still wait in the group leave it, `sender` first: they may wait for one that is silent."""
        waiting = [process for task, process in tasks.items() if not task.done()]
        if waiting:
            yield _told(sender.call(lambda sender: sender.abandon_workers))
        for worker in waiting:
            if worker in self._workers and worker is not sender:
                yield _told(worker.call(lambda worker: worker.leave_weights))

    async def _wait(self, task: Owed, whom: str, what: str, deadline_s: float) -> None:
        """Say that the controller waits for it."""
        with self._waits.on(whom, what, deadline_s):
            await asyncio.wait([task])

    async def _silence(self, tasks: Mapping[Owed, Process[Any]]) -> list[Owed]:
        """Wait for workers to say nothing though they owe an answer. Returns their calls."""
        while True:
            await asyncio.sleep(ASK_S)
            owed = [task for task, process in tasks.items() if not task.done() and process in self._workers]
            heard = await asyncio.gather(*(self._hears(tasks[task]) for task in owed))
            if silent := [task for task, hears in zip(owed, heard, strict=True) if not (hears or task.done())]:
                return silent

    async def _hears(self, worker: Process[RolloutProcess]) -> bool:
        """Whether it says anything."""
        silent_s = FEW * median(self._took_s) if self._took_s else FIRST_SHARE * self._timeout_s
        try:
            async with asyncio.timeout(max(SILENT_S, silent_s)):
                return await worker.call(lambda worker: worker.hears)
        except TimeoutError:
            return False
        except RunError:  # its own call says so, too
            return True

    def _leave_out(self, silent: Mapping[Owed, Process[RolloutProcess]]) -> SilentWorker:
        """Until they have answered."""
        for task, worker in silent.items():
            self._owed[worker.name] = task
            self._left_out[worker.name].set()
        names = " and ".join(worker.name for worker in silent.values())
        return SilentWorker(f"{names}: no sign of life, left out until there is one")


async def _outcome(process: Process[Any], call: Coroutine[Any, Any, R]) -> R:
    """What it answers to this call. A worker whose engine has failed is as good as dead: it is killed, and the fleet
    starts it again. Raises ProcessDied for it."""
    life = process.life
    try:
        return await call
    except EngineError as error:
        if process.life == life:
            process.end()
        raise ProcessDied(process.name, str(error)) from None


async def _told(call: Coroutine[Any, Any, None]) -> None:
    with suppress(RunError):  # the call that it should end says so, too
        await call


def _kill(process: Process[Any], what: str, deadline_s: float) -> ProcessDied:
    log.warning("%s: %s gave no answer in %g s, it is started again", what, process.name, deadline_s)
    process.end()
    return ProcessDied(process.name, f"killed, it gave no answer in {deadline_s:g} s ({what})")
