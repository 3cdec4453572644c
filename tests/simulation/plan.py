"""What a seed stands for: a configuration, how prompts turn out, and everything that goes wrong.

In: a seed. Out: a `Plan`; nothing else in the simulation draws numbers, apart from the links, which have generators of
their own with the same seed. Small on purpose: few steps, small batches and few workers bring about every order of
events much sooner than large ones would.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

from asyncdapo.faults import POINTS
from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.seeds import sample_seed

HEARTBEAT_S = 2.0
GROUP_SIZE = 2
EVAL_ID = 1_000_000
"""Held-out prompts have ids from here on."""
ROLES = ("replay", "replay", "rollout", "rollout", "rollout", "learner", "learner", "controller")
"""Whom a kill hits, the likely ones more than once."""


@dataclass(frozen=True, kw_only=True)
class LinkFaults:
    """The part of the `faults` section that `faults.Link` reads."""

    seed: int
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    truncate: float = 0.0
    delay_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One simulated run."""

    seed: int
    replay: ReplayConfig
    filter: FilterConfig
    max_attempts: int
    num_prompts: int | None
    num_workers: int
    num_slots: int
    steps: int
    more_steps: int
    """Steps by which the run is extended once it has ended; 0 for most."""
    checkpoint_every: int
    segment_bytes: int
    evaluates: bool

    token_s: float
    train_s: float
    constant: float
    """Share of groups without variance."""
    links: LinkFaults
    settles_at: float
    """When all faults end, at the latest."""
    ends_wildly: bool
    """Faults don't end before the last step."""
    kills_at: list[tuple[float, str]] = field(default_factory=list)
    """Who is killed at which time."""
    kills_in: set[tuple[str, str, int]] = field(default_factory=set)
    """(role, point, which time) at which a process kills itself; the points are those of `faults`."""
    cuts: list[tuple[float, float, int]] = field(default_factory=list)
    """From when, for how long a worker's link is down, and whose."""
    leaves: list[tuple[float, float, float, int]] = field(default_factory=list)
    """When a worker is asked to leave, how long it may finish what it holds, for how long it stays away, and which."""
    stops: list[float] = field(default_factory=list)
    """When the launch is asked to stop: leases are handed back, and the next launch resumes."""
    curses: dict[int, str] = field(default_factory=dict)
    """What is wrong with a prompt: it kills its worker, hangs, is slow, breaks its group, or its reward raises."""
    disk_full_at: int = 0
    """Transaction that the disk has no room for; 0 for none."""
    kills_silent: bool = False
    """Workers that the replay server has lost are killed, though they may only be cut off."""
    tears: float = 0.0
    """How likely the newest checkpoint is torn when it is needed."""
    harmful_deaths: bool = False
    """The driver's death does harm to a payload."""
    harms_at: tuple[float, ...] = ()
    """When something happens to a payload during the run."""

    def draws_constant(self, prompt_id: int, weights: int) -> bool:
        """Whether these weights answer the prompt always the same."""
        return sample_seed(self.seed, prompt_id, weights) % 1000 < 1000 * self.constant

    def num_tokens(self, prompt_id: int, weights: int) -> int:
        """Length of the answers; some are long."""
        number = sample_seed(self.seed, weights, prompt_id) % 16
        return 1 + number % 3 + (9 if number == 0 else 0)

    @property
    def save_partials_s(self) -> float | None:
        """None for a third of the runs: what is sampled is saved only when it is handed back."""
        return (None, HEARTBEAT_S, 2 * HEARTBEAT_S)[self.seed % 3]

    @property
    def gentle(self) -> bool:
        """No message is lost or overtaken and no process dies, so that nobody can lose count."""
        links = self.links.drop or self.links.truncate or self.links.reorder or self.cuts or self.leaves or self.stops
        return not (links or self.kills_at or self.kills_in or self.curses)


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    rng = random.Random(seed)
    replay, filter, steps = _replay(rng), _filter(rng, seed), rng.choice((2, 2, 3))
    if filter.replaces:  # there is something to replace only in larger batches
        replay = dataclasses.replace(replay, prompts_per_step=2 + seed % 3)
    size = replay.prompts_per_step
    ends = rng.random() < 0.25
    settles_at = rng.uniform(5, 30)
    wild = rng.random() < 0.9
    plan = {
        "seed": seed,
        "replay": replay,
        "filter": filter,
        "max_attempts": rng.randint(1, 4),
        "num_prompts": rng.randint(size, 5 * size) if ends else None,
        "num_workers": rng.choice((1, 2, 2, 3)),
        "num_slots": rng.choice((2, 3, 4, 6)),
        "steps": steps,
        "more_steps": rng.random() < 0.15,
        "checkpoint_every": rng.randint(1, 3),
        "segment_bytes": rng.choice((1, 100, 1 << 20)),
        "evaluates": rng.random() < 0.15,
        "token_s": rng.choice((0.1, 0.3, 1.0)),
        "train_s": rng.choice((0.2, 1.0, 3.0)),
        "constant": rng.choice((0.0, 0.2, 0.5)),
        "settles_at": settles_at,
        "ends_wildly": rng.random() < 0.3,
        "links": _links(rng, seed, wild),
    }
    return Plan(
        **plan,
        **(_faults(rng, settles_at) if wild else {}),
        leaves=_leaves(seed, settles_at),
        stops=_stops(seed, settles_at),
    )


def _leaves(seed: int, settles_at: float) -> list[tuple[float, float, float, int]]:
    """Of half of the runs. With numbers of their own, so that the other plans are what they were."""
    rng = random.Random(f"{seed} leaves")
    return [
        (rng.uniform(0, settles_at), rng.choice((0.0, 1.0, 10.0)), rng.choice((0.0, 2.0, 12.0)), rng.randint(0, 2))
        for _ in range(rng.choice((0, 0, 1, 2, 4)))
    ]


def _stops(seed: int, settles_at: float) -> list[float]:
    """Of a third of the runs, with numbers of their own."""
    rng = random.Random(f"{seed} stops")
    return [rng.uniform(0, settles_at) for _ in range(rng.choice((0, 0, 0, 0, 1, 2)))]


def _replay(rng: random.Random) -> ReplayConfig:
    run_ahead = rng.choice((0.0, 0.0, 0.5, 1.0, "auto", 2.0))
    return ReplayConfig(
        prompts_per_step=rng.choice((1, 1, 2, 2, 3)),
        run_ahead=run_ahead,
        max_staleness=max(1 if run_ahead == "auto" else int(run_ahead + 0.5), rng.randint(0, 3)),
        on_stale=rng.choice(("auto", "drop", "requeue", "wait")),
        heartbeat_s=HEARTBEAT_S,
        lease_stall_s=6 * HEARTBEAT_S,
    )


def _filter(rng: random.Random, seed: int) -> FilterConfig:
    return FilterConfig(
        enabled=rng.random() < 0.9,
        mode="replace" if seed % 5 in (1, 3) else "filter",
        max_gen_batches=rng.choice((0, 0, 0, 1, 2, 4)),
        gen_batch_multiplier=rng.choice((1, 1, 2)),
        on_limit=rng.choice(("raise", "partial", "unfiltered")),
    )


def _links(rng: random.Random, seed: int, wild: bool) -> LinkFaults:
    delay_s = rng.choice((0.02, 0.1, 0.5, 2.0))
    if not wild or rng.random() < 0.4:
        return LinkFaults(seed=seed, delay_s=delay_s)
    rates = (0.0, 0.02, 0.1, 0.25)
    return LinkFaults(
        seed=seed,
        drop=rng.choice(rates),
        duplicate=rng.choice(rates),
        reorder=rng.choice(rates),
        truncate=rng.choice((0.0, 0.02, 0.05)),
        delay_s=delay_s,
    )


def _faults(rng: random.Random, settles_at: float) -> dict[str, object]:
    num_kills = rng.choice((0, 1, 1, 2, 3, 5))
    kills_at, kills_in = [], set()
    for _ in range(num_kills):
        role = rng.choice(ROLES)
        if rng.random() < 0.4:
            kills_at.append((rng.uniform(0, settles_at), role))
        else:
            point = rng.choice(list(POINTS[role]))
            often = point in ("before_commit", "after_commit", "after_send")
            kills_in.add((role, point, rng.randint(1, rng.choice((10, 30, 60)) if often else 3)))
    return {
        "kills_at": kills_at,
        "kills_in": kills_in,
        "cuts": [
            (rng.uniform(0, settles_at), rng.choice((3.0, 12.0, 34.0)), rng.randint(0, 2))
            for _ in range(rng.choice((0, 0, 0, 1, 2)))
        ],
        "curses": {
            rng.randint(0, 12): rng.choice(("kills", "hangs", "raises", "breaks", "slow"))
            for _ in range(rng.choice((0, 0, 1, 2, 4)))
        },
        "disk_full_at": rng.randint(1, 60) if rng.random() < 0.03 else 0,
        "kills_silent": rng.random() < 0.5,
        "tears": rng.choice((0.0, 0.0, 0.3)),
        "harmful_deaths": rng.random() < 0.1,
        "harms_at": tuple(rng.uniform(0, settles_at) for _ in range(rng.choice((0,) * 9 + (5,)))),
    }
