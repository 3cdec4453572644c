"""Publishing: brings the learner's weights to every rollout worker, and makes a new process group when that fails.

In: `publish` after a train step, `catch_up` for a worker that joined, came back or missed a version. Out: the workers
generate with the version in force; `weights/…` metrics. A transfer that fails leaves the old weights in use everywhere.
The next one goes through a new process group of the workers that are up. A worker that falls silent is left out, and
catches up when it answers again (`ends`). An end that gives no answer by the deadline is killed; the fleet starts it
again, and it catches up. After `weights.max_missed` failures of one version the run ends.

One turn at a time: the learner changes its weights, or sends to all, or sends to one; so a send never waits for a train
step, and what is sent is always the newest that the learner has. (Beside a send it may compute its next gradient.) A
worker catches up beside that: another worker that has the version in force sends it. The learner does so only if none
has it. A publish goes first: it ends such a transfer, and brings the newcomer what is new. Nothing here touches a
tensor: the controller only tells both ends when.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asyncdapo.accounting.spans import Span, SpanRing
from asyncdapo.controller.fleet.process import Process, ProcessDied
from asyncdapo.controller.fleet.weights.ends import Ends, SilentWorker
from asyncdapo.controller.process.waits import Waits
from asyncdapo.errors import RanksError, RunError, WeightsError
from asyncdapo.transport.backend import Backend, host_of
from asyncdapo.weights.backend import choose_backend
from asyncdapo.weights.config import WeightsConfig

if TYPE_CHECKING:
    from asyncdapo.controller.roles.learner import LearnerProcess
    from asyncdapo.controller.roles.rollout import RolloutProcess
    from asyncdapo.weights.manifest import Manifest

log = logging.getLogger("weights")

ROOM_S = 300.0
"""What workers may take to make room for the weights: to pin 64 GiB may take minutes."""

PARTS = ("receive_s", "pause_s", "load_s", "resume_s")
"""Of what a worker does with a version, in this order; the slowest worker's is reported."""

Life = tuple[str, int]
"""A process in one of its lives."""


class Publishing:
    """One learner, any number of workers, one process group at a time."""

    def __init__(
        self,
        config: WeightsConfig,
        waits: Waits,
        learner: Process[LearnerProcess],
        workers: Sequence[Process[RolloutProcess]],
        other_shards: Sequence[Process[LearnerProcess]] = (),
    ) -> None:
        """`waits`: the controller's. `learner`: rank 0, which sends. `other_shards`: the ranks that have the other
        shards of what it sends."""
        self._ends = Ends(waits, config.timeout_s, workers)
        self.config, self.learner, self.workers, self.other_shards = config, learner, workers, other_shards
        self.turn = asyncio.Lock()
        """Held while the learner changes its weights or sends them."""
        self._sending = asyncio.Lock()
        """Held while it sends."""
        self.version, self.branch = 0, 0
        """What the learner has, and in which branch."""
        self._members: list[Life] = []
        """Of the process group, the learner first; none when there is no group."""
        self._loaded: dict[str, tuple[int, int, int]] = {}
        """Life, branch and version of what each worker generates with, as far as it came from here."""
        self._backend = ""
        self._devices: dict[str, str] = {}
        """Each end's, as it said last."""
        self._newcomers = asyncio.Lock()
        """Held while a worker sends to another one."""
        self.sends = SpanRing()
        """Of versions, to all workers or to one."""

    async def begin(self) -> None:
        """Make the first group, so that what is wrong with it shows before anything is sampled. An end that dies
        or is silent meanwhile is not an error: the next transfer makes a group without it."""
        async with self.turn:
            try:
                await self._regroup(self.reachable())
            except (ProcessDied, SilentWorker) as absence:
                log.warning("no weight group yet: %s", absence)

    def learner_has(self, version: int, branch: int) -> None:
        """From now on this is what is sent. Called with the turn held, or while nobody may send."""
        self.version, self.branch = version, branch

    def reachable(self) -> list[Process[RolloutProcess]]:
        """The workers that are up, and not silent."""
        return [worker for worker in self.workers if worker.up.is_set() and not self._ends.is_silent(worker)]

    async def publish(self) -> dict[str, float]:
        """Send what the learner has to every worker that is up; returns when all of them generate with it. Workers that
        aren't up catch up when they are."""
        async with self.turn:
            failures: list[RunError] = []
            while len(failures) < self.config.max_missed:
                try:
                    async with self._sending:
                        return await self._send_to(self.reachable())
                except (WeightsError, ProcessDied) as error:
                    self._note_failure(error)
                    if not self._learner_is_up():
                        raise
                    failures += [] if isinstance(error, SilentWorker) else [error]
        raise RunError(
            f"version {self.version} did not arrive {self.config.max_missed} times (weights.max_missed): {failures[-1]}"
        )

    async def catch_up(self, worker: Process[RolloutProcess]) -> None:
        """Have what the learner has sent to this worker, unless it has it. After `weights.max_missed` failures the
        worker is killed. Returns early when the learner dies: then all workers are sent to when it is back."""
        num_failures = 0
        while num_failures < self.config.max_missed:
            await self._ends.until_heard(worker)
            if await self._has_it_from_another(worker):
                return
            if self._ends.is_silent(worker):
                continue
            async with self.turn:
                if self._has_current(worker):
                    return
                try:
                    async with self._sending:
                        await self._send_to([worker])
                    log.info("%s caught up with version %d", worker.name, self.version)
                    return
                except RanksError as error:  # the train loop notices it too, and starts the learner again
                    self._note_failure(error)
                    return
                except (WeightsError, ProcessDied) as error:
                    self._note_failure(error)
                    if not (self._learner_is_up() and worker.up.is_set()):
                        return
                    num_failures += not isinstance(error, SilentWorker)
        log.warning("%s missed version %d %d times", worker.name, self.version, self.config.max_missed)
        worker.end()

    async def keep_current(self, worker: Process[RolloutProcess]) -> None:
        """Have it catch up whenever it was left out of a transfer and answers again."""
        while True:
            await self._ends.until_left_out(worker)
            await self.catch_up(worker)

    async def let_go(self, worker: Process[RolloutProcess]) -> None:
        """End a worker's process, when no transfer that counts on it is under way."""
        worker.up.clear()
        async with self._sending:
            worker.end()

    async def _has_it_from_another(self, worker: Process[RolloutProcess]) -> bool:
        """Have the version in force sent to it by another worker, unless it has it. Returns whether it then has it."""
        async with self._newcomers:
            async with self._sending:
                pass  # a transfer to all may bring it
            if self._has_current(worker):
                return True
            try:
                [device] = await self._ends.answers(
                    "its device", {worker: worker.call(lambda worker: worker.device)}, worker
                )
                self._devices[worker.name] = device
                if sender := self._nearest_with_current(worker):
                    await self._send_from(sender, worker)
                    return True
            except (WeightsError, ProcessDied) as error:
                log.warning("no other worker could bring version %d to %s: %s", self.version, worker.name, error)
            return False

    # ----------------------------------------------------------------------------------------------------- transfers

    def _learner_is_up(self) -> bool:
        return all(rank.up.is_set() for rank in (self.learner, *self.other_shards))

    def _has_current(self, worker: Process[RolloutProcess]) -> bool:
        """Version 0 of branch 0 is what every worker loads from the model's own file."""
        loaded = self._loaded.get(worker.name, (worker.life, 0, 0))
        return loaded == (worker.life, self.branch, self.version)

    def _nearest_with_current(self, newcomer: Process[RolloutProcess]) -> Process[RolloutProcess] | None:
        """A worker that has been sent the version in force, on the newcomer's machine if there is one."""
        sent = [worker for worker in self.reachable() if worker.name in self._loaded and self._has_current(worker)]
        here = host_of(self._devices[newcomer.name])
        return min(sent, key=lambda worker: host_of(self._devices[worker.name]) != here, default=None)

    def _note_failure(self, error: RunError) -> None:
        self._members = []
        log.warning("version %d did not arrive: %s", self.version, error)

    async def _send_to(self, workers: Sequence[Process[RolloutProcess]]) -> dict[str, float]:
        if not workers:
            sent_s = dict.fromkeys(("weights/publish_s", "weights/gather_s", "weights/send_s", "weights/bytes"), 0.0)
            return sent_s | {f"weights/{part}": 0.0 for part in PARTS}
        if self._members != _lives([self.learner, *workers]):
            await self._regroup(workers)
        version, branch, learner, began_s = self.version, self.branch, self.learner, time.monotonic()
        sent, *others = await self._ends.answers(
            f"the transfer of version {version}",
            {learner: learner.call(lambda learner: learner.send_weights, version, branch)}
            | {rank: rank.call(lambda rank: rank.give_shards) for rank in self.other_shards}
            | {worker: worker.call(lambda worker: worker.receive_weights, version, branch) for worker in workers},
            learner,
        )
        self._ends.note_transfer(time.monotonic() - began_s)
        self.sends.add(Span(f"send version {version}", began_s, time.monotonic()))
        received = others[len(self.other_shards) :]
        for worker in workers:
            self._note_loaded(worker, branch, version)
        slowest = {part: max(report[part] for report in received) for part in PARTS}
        return {
            "weights/publish_s": sent["seconds"],
            "weights/gather_s": sent["gather_s"],
            "weights/send_s": sent["seconds"] - sent["gather_s"],
            "weights/bytes": sent["bytes"],
            **{f"weights/{part}": seconds for part, seconds in slowest.items()},
        }

    def _note_loaded(self, worker: Process[RolloutProcess], branch: int, version: int) -> None:
        """Unless something newer came meanwhile."""
        now = (worker.life, branch, version)
        self._loaded[worker.name] = max(self._loaded.get(worker.name, now), now)

    async def _send_from(self, sender: Process[RolloutProcess], newcomer: Process[RolloutProcess]) -> None:
        """One worker sends the version in force to another one, through a group of these two."""
        version, branch = self.version, self.branch
        what, began_s = f"version {version} from {sender.name} to {newcomer.name}", time.monotonic()
        backend, _ = choose_backend(self.config, {end.name: self._devices[end.name] for end in (sender, newcomer)})

        async def receive(address: str, manifest: Manifest) -> None:
            await newcomer.call(lambda worker: worker.join_weights, address, 1, 2, backend, manifest, sender.name)
            await newcomer.call(lambda worker: worker.receive_weights, version, branch, sender.name)

        hosts = {sender: sender.call(lambda worker: worker.host_weights, backend)}
        [(address, manifest)] = await self._ends.answers(what, hosts, sender)
        rooms = {newcomer: newcomer.call(lambda worker: worker.make_weights_room, manifest)}
        await self._ends.answers("room for the weights", rooms, sender, ROOM_S)
        sends = {sender: sender.call(lambda worker: worker.send_weights, version, branch, newcomer.name)}
        await self._ends.answers(what, sends | {newcomer: receive(address, manifest)}, sender)
        self._note_loaded(newcomer, branch, version)
        self.sends.add(Span(what, began_s, time.monotonic()))
        log.info("%s caught up with version %d, from %s", newcomer.name, version, sender.name)

    async def _regroup(self, workers: Sequence[Process[RolloutProcess]]) -> None:
        """Make the process group: the learner is rank 0 and hosts the store, the workers follow."""
        self._members = []
        if not workers:
            return
        what, learner = "the weight group", self.learner
        devices = await self._ends.answers(
            what,
            {learner: learner.call(lambda learner: learner.device)}
            | {worker: worker.call(lambda worker: worker.device) for worker in workers},
            learner,
        )
        ends = [learner, *workers]
        names = [end.name for end in ends]
        self._devices |= zip(names, devices, strict=True)
        backend = self._choose_backend({name: self._devices[name] for name in names})
        world_size = len(ends)
        hosts = learner.call(lambda learner: learner.host_weights, world_size, backend)
        [(address, manifest)] = await self._ends.answers(what, {learner: hosts}, learner)
        rooms = {worker: worker.call(lambda worker: worker.make_weights_room, manifest) for worker in workers}
        await self._ends.answers("room for the weights", rooms, learner, ROOM_S)
        joins = {
            worker: worker.call(lambda worker: worker.join_weights, address, rank, world_size, backend, manifest)
            for rank, worker in enumerate(workers, start=1)
        }
        accepts = {learner: learner.call(lambda learner: learner.accept_workers)}
        await self._ends.answers(what, accepts | joins, learner)
        self._members = _lives(ends)

    def _choose_backend(self, devices: Mapping[str, str]) -> Backend:
        """For these devices of each end; said whenever it is another one."""
        backend, reason = choose_backend(self.config, devices)
        if backend != self._backend:
            self._backend = backend
            log.info("by %s: %s", backend, reason)
        return backend


def _lives(processes: Sequence[Process[Any]]) -> list[Life]:
    return [(process.name, process.life) for process in processes]
