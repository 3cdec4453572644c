"""Placement: which process lives with which, and on how many GPUs. Pure: nothing here asks Ray, or any other machine.

    separate   every rank of the learner has a GPU, every engine `rollout.tensor_parallel` of them, on one node
    shared     learner rank r and rollout worker r are on the same GPU
    auto       separate where there are enough GPUs; with fewer, equal parts of each; with none, the CPU

The workers of `rollout.num_workers` beyond its min have no place here: each gets room of its own while there is some.

In: the configuration, the GPUs of each node, and the learner's ranks (none where nothing is trained). Out: bundles,
each of which Ray gives whole on a node of its choice (as few nodes as it can). Raises ConfigError that says what is
asked for and what there is. Invariant: every process is in one bundle; the processes of a bundle share one GPU, or each
has one of its own on the same node. Where every process has GPUs of its own, the ranks that have one copy of the
weights (`learner.shards`) are in as few bundles as the nodes allow. Does not own: asking Ray (`rooms`), how many
shards there are (`auto`), which backend the weights take (`weights.backend`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asyncdapo.config.config import Config
from asyncdapo.controller.process.roster import process_name
from asyncdapo.errors import ConfigError

ALONE_FRACTION = 0.9
"""Of a GPU's memory, for an engine that has it to itself."""
SHARED_FRACTION = 0.8
"""Of a GPU's memory, for all processes on it together, in equal parts: CUDA itself needs some in each of them."""
SHARE_STEP = 10_000
"""Ray counts GPUs in steps of 1 / 10,000; parts are rounded down to them, so that all of them fit."""


@dataclass(frozen=True)
class Bundle:
    """Room for processes that must be on one node. If it has GPUs, they share its only one, or each has one; an engine
    alone has all of them."""

    processes: tuple[str, ...]
    num_gpus: int = 0

    @property
    def share(self) -> float:
        """GPUs that each of its processes asks Ray for."""
        return math.floor(SHARE_STEP * self.num_gpus / len(self.processes)) / SHARE_STEP

    @property
    def is_lone_worker(self) -> bool:
        """Whether a rollout worker is alone in it."""
        return len(self.processes) == len(self.of_role("rollout")) == 1

    @property
    def shares_gpu(self) -> bool:
        """Whether several processes are on its GPU."""
        return 0 < self.num_gpus < len(self.processes)

    @property
    def parts(self) -> tuple[Bundle, ...]:
        """Itself, or for processes with a GPU each a bundle for every one."""
        if self.num_gpus < 2 or self.num_gpus != len(self.processes):
            return (self,)
        return tuple(Bundle((name,), 1) for name in self.processes)

    def of_role(self, role: str) -> list[str]:
        """Its processes of this role."""
        return [name for name in self.processes if name.partition("-")[0] == role]

    def gpus_of(self, process: str) -> range:
        """Which of its GPUs this process has, by number."""
        if len(self.parts) == 1:
            return range(self.num_gpus)
        place = self.processes.index(process)
        return range(place, place + 1)


@dataclass(frozen=True)
class Placement:
    """Where all processes of a run live."""

    bundles: tuple[Bundle, ...]
    reason: str
    """Which of the three it is and why, for the log."""
    gpus_of_newcomer: int = 0
    """That each worker beyond those placed asks for."""

    @property
    def num_processes(self) -> int:
        return sum(len(bundle.processes) for bundle in self.bundles)

    @property
    def num_gpus(self) -> int:
        return sum(bundle.num_gpus for bundle in self.bundles)

    @property
    def shares_gpus(self) -> bool:
        """Whether processes are on the same GPU as others."""
        return any(bundle.shares_gpu for bundle in self.bundles)

    def on_gpus(self, role: str) -> bool:
        """Whether the processes of this role, of which there may be none, have GPUs: all of them have, or none has."""
        return bool(self.with_gpus(role))

    def with_gpus(self, role: str) -> list[Bundle]:
        """The bundles in which processes of this role have GPUs."""
        return [bundle for bundle in self.bundles if bundle.num_gpus and bundle.of_role(role)]

    def bundle(self, process: str) -> Bundle:
        """The bundle that this process is in; of a worker that isn't placed one of its own."""
        placed = (bundle for bundle in self.bundles if process in bundle.processes)
        return next(placed, Bundle((process,), self.gpus_of_newcomer))

    def num_gpus_of(self, process: str) -> float:
        """GPUs that it has; one that others share counts in equal parts."""
        bundle = self.bundle(process)
        return bundle.num_gpus / len(bundle.processes)

    def memory_fraction(self, process: str, given: float | None) -> float:
        """Share of the memory of its GPUs that an engine may take: what the user says, else what leaves the others on
        it as much."""
        num_processes = len(self.bundle(process).processes)
        return given or (ALONE_FRACTION if num_processes == 1 else round(SHARED_FRACTION / num_processes, 4))


def learner_names(config: Config) -> list[str]:
    """The ranks of the learner, rank 0 first."""
    return [process_name("learner", rank) for rank in range(config.learner.ranks)]


def worker_names(config: Config) -> list[str]:
    """The rollout workers that a run starts with."""
    return [process_name("rollout", index) for index in range(config.rollout.min_workers)]


@dataclass(frozen=True)
class _Asked:
    """What a configuration asks for: these ranks of the learner, and its workers."""

    config: Config
    ranks: Sequence[str]

    @property
    def workers(self) -> list[str]:
        return worker_names(self.config)

    @property
    def ranks_on_gpus(self) -> Sequence[str]:
        return [] if self.config.learner.device == "cpu" else self.ranks

    @property
    def workers_on_gpus(self) -> Sequence[str]:
        return [] if self.config.rollout.device == "cpu" else self.workers

    @property
    def num_gpus(self) -> int:
        """With which nobody has less than `controller.placement` promises; for `auto`, than a whole one."""
        if self.config.controller.placement == "shared":
            return max(len(self.ranks), len(self.workers))
        return len(self.ranks_on_gpus) + self.config.rollout.tensor_parallel * len(self.workers_on_gpus)


def gpus_asked(config: Config) -> int:
    """GPUs with which no process of a run has less than `controller.placement` promises."""
    return _Asked(config, learner_names(config)).num_gpus


def place(config: Config, gpus_of_nodes: Sequence[int], ranks: Sequence[str] | None = None) -> Placement:
    """`gpus_of_nodes`: how many GPUs each node has. `ranks`: of the learner, all that the configuration names unless
    given. Raises ConfigError where the GPUs are too few for what is asked."""
    asked = _Asked(config, learner_names(config) if ranks is None else ranks)
    mode, num_gpus = config.controller.placement, sum(gpus_of_nodes)
    if mode == "shared":
        if num_gpus < asked.num_gpus:
            raise _too_few(asked, "shared", gpus_of_nodes, "auto makes do with what there is")
        return _on_gpus(asked, _pairs(asked), "shared: learner rank r and rollout worker r are on one GPU")
    if not asked.num_gpus:
        devices = "learner and rollout are on the CPU, as learner.device and rollout.device say"
        return _on_gpus(asked, [], devices if asked.ranks else "rollout is on the CPU, as rollout.device says")
    if _fits(asked, gpus_of_nodes):
        bundles = _each_its_own(asked, _num_together(asked, gpus_of_nodes))
        return _on_gpus(asked, bundles, "separate: every process has GPUs of its own")
    if mode == "separate":
        raise _too_few(asked, "separate", gpus_of_nodes, "auto makes do with what there is")
    if not num_gpus:
        _refuse_cuda(asked)
        return _on_gpus(asked, [], "there is no GPU: everything is on the CPU")
    if asked.workers_on_gpus and config.rollout.tensor_parallel > 1:
        raise _too_few(asked, "auto", gpus_of_nodes, "engines of several GPUs share none: a smaller tensor_parallel")
    users = [*asked.ranks_on_gpus, *asked.workers_on_gpus]
    reason = f"{len(users)} processes are dealt to {count_gpus(num_gpus)}, in equal parts"
    return _on_gpus(asked, _dealt(users, num_gpus), reason)


def _refuse_cuda(asked: _Asked) -> None:
    learner, rollout = asked.config.learner.device, asked.config.rollout.device
    for key, device, users in (
        ("learner.device", learner, asked.ranks),
        ("rollout.device", rollout, asked.workers),
    ):
        if users and device == "cuda":
            raise ConfigError(key, "there is no GPU", device, "use auto or cpu")


def _fits(asked: _Asked, gpus_of_nodes: Sequence[int]) -> bool:
    """Whether everybody finds whole GPUs, an engine all of its own on one node. Engines go first: a rank, which wants
    one GPU, takes any that they leave."""
    size = asked.config.rollout.tensor_parallel
    return asked.num_gpus <= sum(gpus_of_nodes) and len(asked.workers_on_gpus) <= sum(
        num_gpus // size for num_gpus in gpus_of_nodes
    )


def _num_together(asked: _Asked, gpus_of_nodes: Sequence[int]) -> int:
    """Most consecutive ranks that can be kept on one node, in equal parts of the shards of a replica."""
    num_shards, num_ranks = asked.config.learner.num_shards, len(asked.ranks_on_gpus)
    engines = [asked.config.rollout.tensor_parallel] * len(asked.workers_on_gpus)
    for num_together in range(min(num_shards, max(gpus_of_nodes)), 1, -1):
        parts = [num_together] * (num_ranks // num_together)
        if num_ranks and num_shards % num_together == 0 and _go_on_nodes(engines + parts, gpus_of_nodes):
            return num_together
    return 1


def _go_on_nodes(sizes: Sequence[int], gpus_of_nodes: Sequence[int]) -> bool:
    """Whether bundles of so many GPUs find room, the largest first, each on the fullest node that has it."""
    free = sorted(gpus_of_nodes)
    for size in sorted(sizes, reverse=True):
        node = next((index for index, num_gpus in enumerate(free) if num_gpus >= size), None)
        if node is None:
            return False
        free[node] -= size
        free.sort()
    return True


def _each_its_own(asked: _Asked, num_together: int) -> list[Bundle]:
    names = tuple(asked.ranks_on_gpus)
    ranks = [Bundle(names[r : r + num_together], num_together) for r in range(0, len(names), num_together)]
    return ranks + [Bundle((name,), asked.config.rollout.tensor_parallel) for name in asked.workers_on_gpus]


def _pairs(asked: _Asked) -> list[Bundle]:
    """Rank r with worker r; whoever has no partner has a GPU alone."""
    return [Bundle((*asked.ranks[r : r + 1], *asked.workers[r : r + 1]), 1) for r in range(asked.num_gpus)]


def _dealt(users: Sequence[str], num_gpus: int) -> list[Bundle]:
    """In turn, so that every rank of the learner is on another GPU than the rank before."""
    return [Bundle(tuple(users[gpu::num_gpus]), 1) for gpu in range(min(num_gpus, len(users)))]


def _on_gpus(asked: _Asked, bundles: Sequence[Bundle], reason: str) -> Placement:
    """These bundles, and one without a GPU for every other process; the replay server's is the first."""
    placed = {name for bundle in bundles for name in bundle.processes}
    others = [name for name in [*asked.ranks, *asked.workers] if name not in placed]
    of_newcomer = asked.config.rollout.tensor_parallel if set(asked.workers) & placed else 0
    return Placement((Bundle(("replay",)), *bundles, *(Bundle((name,)) for name in others)), reason, of_newcomer)


def _too_few(asked: _Asked, mode: str, gpus_of_nodes: Sequence[int], fix: str) -> ConfigError:
    ranks, workers, size = len(asked.ranks), len(asked.workers), asked.config.rollout.tensor_parallel
    users = [f"{ranks} {_plural(ranks, 'learner rank')}"] if asked.ranks_on_gpus else []
    if asked.workers_on_gpus:
        on_one_node = f" of {size} GPUs on one node" if size > 1 else ""
        users.append(f"{workers} {_plural(workers, 'engine')}{on_one_node}")
    problem = f"asks for {count_gpus(asked.num_gpus)} ({', '.join(users)}), {_there_are(gpus_of_nodes)}"
    return ConfigError("controller.placement", problem, mode, fix)


def _there_are(gpus_of_nodes: Sequence[int]) -> str:
    if not sum(gpus_of_nodes):
        return "there is none"
    with_gpus = [str(num_gpus) for num_gpus in gpus_of_nodes if num_gpus]
    nodes = f" on {len(with_gpus)} nodes ({' + '.join(with_gpus)})" if len(with_gpus) > 1 else ""
    return f"there {'is' if sum(gpus_of_nodes) == 1 else 'are'} {sum(gpus_of_nodes)}{nodes}"


def count_gpus(num_gpus: int) -> str:
    """In words: 1 GPU, 2 GPUs."""
    return f"{num_gpus} {_plural(num_gpus, 'GPU')}"


def _plural(number: int, noun: str) -> str:
    return noun if number == 1 else f"{noun}s"
