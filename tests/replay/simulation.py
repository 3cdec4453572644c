"""A small world around the core: workers that join, die and come back, a learner, and messages that come late or twice.

Which of the possible things happens next is read from a string of bytes, so that hypothesis can shrink a failure to the
few events that bring it about. Every event passes through the core and through `Truth`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.core.waits import why_waiting
from tests.replay.scenario import group_done
from tests.replay.truth import Truth


@dataclass
class SimWorker:
    """A rollout worker with `num_slots` places for leases."""

    num_slots: int
    loaded: int
    running: dict[int, int | None] = field(default_factory=dict)
    """Lease → version that it started with, None before it starts."""


@dataclass(frozen=True)
class World:
    """What a simulation is made of."""

    replay: ReplayConfig
    filter: FilterConfig
    max_attempts: int
    num_prompts: int | None
    num_workers: int
    num_slots: int
    learner_pace: int
    rollout_pace: int


class Simulation:
    """`run(choices)` lets anything happen, `settle()` lets everything go well."""

    def __init__(self, world: World) -> None:
        self.world = world
        limits = {"max_attempts": world.max_attempts, "num_prompts": world.num_prompts}
        self.state = ReplayState(world.replay, world.filter, **limits)
        self.truth = Truth(world.replay, world.filter, **limits)
        self.workers: dict[int, SimWorker] = {}
        self.echoes: list[core.Event] = []
        """Answers that may still arrive, although their lease is over."""
        self.num_asked, self.num_trained, self.num_published = 0, 0, 0
        self.log: list[tuple[core.Event, list[core.Action]]] = []
        self._choices = iter(b"")

    # ------------------------------------------------------------------------------------------------- the outside

    def tell(self, event: core.Event) -> None:
        actions = self.state.handle(event)
        self.write(event, actions)
        self.log.append((event, actions))
        for action in actions:
            if isinstance(action, core.GrantLease):
                self.workers[action.worker].running[action.lease_id] = None
        self.truth.observe(event, actions)
        for action in actions:
            if isinstance(action, core.EndLease) and action.outcome == "withdrawn" and action.worker in self.workers:
                self._withdraw(action.worker, action.lease_id)
        self.check_wait()

    def write(self, event: core.Event, actions: list[core.Action]) -> None:
        """What the server would do with them before it tells anybody; `restarts.py` keeps a ledger."""

    def _withdraw(self, worker: int, lease_id: int) -> None:
        """The worker may have sent the group before it heard of it."""
        started = self.workers[worker].running.pop(lease_id)
        if started is not None:
            self.echoes.append(group_done(lease_id, "kept", started, self.workers[worker].loaded))

    def check_wait(self) -> None:
        """Whoever the wait names has something to do."""
        line = why_waiting(self.state)
        trains = set(self.truth.batches) - self.truth.trained
        unpublished = self.truth.trained - set(range(self.num_published + 1))
        behind = any(worker.loaded < self.num_published for worker in self.workers.values())
        has_free_slot = any(credit == 0 for credit in self.truth.credits.values())
        truthful = {
            "learner": bool(trains) or self.truth.wanted < self.truth.next_step,
            "weights": bool(unpublished) or behind,
            "rollout": bool(self.truth.leases) or has_free_slot,
            "no live worker": not self.workers,
            "run over": self.truth.over,
        }
        name = next(name for name in truthful if line.startswith(name))
        assert truthful[name], f"{line!r} names someone who has nothing to do"

    # ------------------------------------------------------------------------------------------------ what may happen

    def run(self, choices: bytes) -> None:
        """One event for every few bytes, until they are used up or the run is over."""
        self._choices = iter(choices)
        while not self.truth.over:
            try:
                self._one_of(self._possible())()
            except StopIteration:
                return

    def _pick(self, num: int) -> int:
        """Raises StopIteration when the choices are used up, so everything is picked before anything changes."""
        return next(self._choices) % num

    def _one_of(self, options: list) -> object:
        return options[self._pick(len(options))]

    def _possible(self) -> list[Callable[[], None]]:
        """Frequent things stand in the list more than once."""
        possible = self._learner_steps() * self.world.learner_pace
        if len(self.workers) < self.world.num_workers:
            possible += [self._join] * 4
        if self.workers:
            possible += [self._ask, self._ask, self._ask, self._load, self._leave]
        if any(worker.running for worker in self.workers.values()):
            possible += [self._start, self._start, self._fail, self._lose] + [self._finish] * self.world.rollout_pace
            possible += [self._save, self._hand_back]
        if self.echoes:
            possible.append(self._echo)
        return possible

    def _join(self) -> None:
        index = self._one_of([i for i in range(self.world.num_workers) if i not in self.workers])
        loaded = self._pick(self.num_published + 1) if self._pick(4) == 0 else self.num_published
        self.workers[index] = SimWorker(self.world.num_slots, loaded)
        self.tell(core.WorkerJoined(worker=index, loaded_version=loaded, continues=loaded % 3 != 2))

    def _ask(self) -> None:
        index = self._one_of(list(self.workers))
        worker = self.workers[index]
        credits = self._pick(worker.num_slots - len(worker.running) + 1)
        self.tell(core.Ready(worker=index, credits=credits, pace=(1.0, 0.3)[credits % 2]))

    def _load(self) -> None:
        """Some version that was sent since; a publish that is never loaded is one that was lost. It is sent while the
        account of its step is on its way, so a worker may have it first."""
        index = self._one_of(list(self.workers))
        worker = self.workers[index]
        has_batch = self.num_trained < min(self.num_asked, self.truth.num_cut)
        sent = min(self.num_trained + has_batch, self.num_published + 1)
        if worker.loaded < sent:
            worker.loaded += 1 + self._pick(sent - worker.loaded)
            self.tell(core.WeightsLoaded(worker=index, version=worker.loaded))

    def _leave(self) -> None:
        """It dies, or is drained and hands back what it holds. Groups that it has begun may come all the same."""
        index = self._one_of(list(self.workers))
        if leave := self._one_of([core.WorkerLost, core.WorkerDrained, None, None, None]):
            worker = self.workers.pop(index)
            for lease_id, started in worker.running.items():
                if started is not None:
                    self.echoes.append(group_done(lease_id, "kept", started, worker.loaded))
            self.tell(leave(worker=index))

    def _one_lease(self) -> tuple[SimWorker, int]:
        return self._one_of([(w, lease_id) for w in self.workers.values() for lease_id in w.running])

    def _start(self) -> None:
        worker, lease_id = self._one_lease()
        if worker.running[lease_id] is None:
            worker.running[lease_id] = worker.loaded
            self.tell(core.SamplingBegan(lease_id=lease_id, version=worker.loaded))

    def _finish(self) -> None:
        """Now and then `started` never came, or the group has an older token than its lease let on."""
        worker, lease_id = self._one_lease()
        verdict = self._one_of(["kept", "kept", "constant", "masked", "constant", "kept"])
        age = self._pick(16) == 0
        started = worker.running.pop(lease_id)
        version = max(0, self._oldest(lease_id, worker.loaded if started is None else started) - age)
        done = group_done(lease_id, verdict, version, worker.loaded)
        self.echoes.append(done)
        self.tell(done)

    def _oldest(self, lease_id: int, version: int) -> int:
        """The lease's oldest version, if its worker began with `version`, perhaps behind what another had sampled."""
        partial = self.truth.partials.get(self.truth.leases[lease_id].prompt_id)
        return min(version, partial.min_version) if partial else version

    def _save(self) -> None:
        """The worker saves what it has sampled; now and then a lease that is over does so, too."""
        worker, lease_id = self._one_lease()
        num_more = 2 + self._pick(5)
        started = worker.running[lease_id]
        if started is None:
            return
        saved = self.truth.partials.get(self.truth.leases[lease_id].prompt_id)
        partial = core.Partial(
            min_version=self._oldest(lease_id, started),
            max_version=max(worker.loaded, saved.max_version if saved else 0),
            num_tokens=num_more + (saved.num_tokens if saved else 0),
        )
        event = core.PartialSaved(lease_id=lease_id, partial=partial)
        if num_more == 2:
            self.echoes.append(event)
        self.tell(event)

    def _hand_back(self) -> None:
        """What it hands back it may have saved before."""
        worker, lease_id = self._one_lease()
        if self._pick(3) == 0:
            self.echoes.append(core.LeaseHandedBack(lease_id=lease_id))
            self.tell(core.LeaseHandedBack(lease_id=lease_id))

    def _fail(self) -> None:
        worker, lease_id = self._one_lease()
        if self._pick(8) == 0:
            del worker.running[lease_id]
            self.echoes.append(core.LeaseFailed(lease_id=lease_id))
            self.tell(core.LeaseFailed(lease_id=lease_id))

    def _lose(self) -> None:
        worker, lease_id = self._one_lease()
        reason = self._one_of(["", "", "", "", "", "", "stalled", "rejected"])
        if reason:
            started = worker.running.pop(lease_id)
            self.echoes.append(group_done(lease_id, "kept", started or 0, worker.loaded))
            self.tell(core.LeaseLost(lease_id=lease_id, reason=reason))

    def _echo(self) -> None:
        """Something comes again, or too late. It stays, and may come once more."""
        self.tell(self._one_of(self.echoes))

    def _learner_steps(self) -> list[Callable[[], None]]:
        """Ask for the next batch (again), train the batch, publish the weights; asking waits neither for publishing nor
        for training, but at most one batch is ahead of the one that is trained."""
        steps = [self._want_old] if self.num_trained else []
        if self.num_asked <= self.num_trained + 1 or self.num_asked > self.truth.num_cut:
            steps.append(self._want)
        if self.num_trained < min(self.num_asked, self.truth.num_cut):
            steps.append(self._train)
        if self.num_published < self.num_trained:
            steps.append(self._publish)
        return steps

    def _want(self) -> None:
        if self.num_asked <= self.truth.num_cut:
            self.num_asked += 1
        self.tell(core.BatchWanted(step=self.num_asked))

    def _want_old(self) -> None:
        """Said again though the batch has come."""
        self.tell(core.BatchWanted(step=self.num_trained))

    def _train(self) -> None:
        self.num_trained += 1
        self.tell(core.Trained(step=self.num_trained))

    def _publish(self) -> None:
        self.num_published = self.num_trained
        self.tell(core.Published(version=self.num_published))

    def finish_all(self) -> None:
        """Whatever still runs comes in, whether or not the run is over."""
        for worker in self.workers.values():
            while worker.running:
                lease_id, started = worker.running.popitem()
                version = worker.loaded if started is None else started
                self.tell(group_done(lease_id, "constant", version, worker.loaded))

    # --------------------------------------------------------------------------------------------- when all goes well

    def settle(self, num_batches: int) -> None:
        """Every worker lives and loads, every group is kept: the batches come, or the run is over for a reason."""
        goal = self.truth.num_cut + num_batches
        for _ in range(40 * (num_batches + 4)):
            if self.truth.over or self.truth.num_cut >= goal:
                return
            self._round()
        raise AssertionError(f"no progress: {why_waiting(self.state)}")

    def _round(self) -> None:
        for index in set(range(self.world.num_workers)) - self.workers.keys():
            self.workers[index] = SimWorker(self.world.num_slots, self.num_published)
            self.tell(core.WorkerJoined(worker=index, loaded_version=self.num_published))
        for index, worker in self.workers.items():
            if worker.loaded < self.num_published:
                worker.loaded = self.num_published
                self.tell(core.WeightsLoaded(worker=index, version=worker.loaded))
            self.tell(core.Ready(worker=index, credits=worker.num_slots - len(worker.running)))
        for worker in self.workers.values():
            for lease_id, started in list(worker.running.items()):
                if worker.running.pop(lease_id, "withdrawn") != "withdrawn":
                    version = worker.loaded if started is None else started
                    self.tell(group_done(lease_id, "kept", version, worker.loaded))
        if steps := self._learner_steps():
            steps[-1]()
