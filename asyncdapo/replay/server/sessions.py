"""Sessions: which workers are connected, which leases they hold, and which are silent. No sockets.

In: hellos, heartbeats, leases granted and ended, ticks, and what the ledger knew of them. Out: the session of a peer,
credits owed, silent workers, stalled leases and lost `Lease` messages. Time is counted in ticks: one tick is one
heartbeat interval during which the server itself ran. A server that was stopped counts no ticks, so it doesn't take its
own pause for the death of its workers.

A worker has one session at a time. A newer session replaces the older one, whose peer is then a stranger. The session
of a worker that was lost for silence stays, and is alive again with the next heartbeat. A session that the ledger knew
keeps its name, and has no peer until its worker says hello.

    stalled     the lease makes no progress for `stall_ticks`. Progress of a lease that is being sampled is a new token
                of its own. While it waits for a slot, progress is any token of its worker's engine, since only tokens
                free a slot. Once all its tokens are there it always makes progress: verifiers have time-outs of their
                own, and groups are sent until they are acknowledged. So a full engine or a slow verifier doesn't count
                as a hung engine, and a hung engine stalls every lease that waits for it
    not listed  `MAX_UNLISTED` heartbeats in a row don't list the lease: its message was lost, and is sent again

Memory: a session per worker, leases within the limits of admission, three sums.
Does not own: what follows from a loss (the core), evaluation requests (`evaluations`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncdapo.messages import Heartbeat, Hello, Progress, Prompt
from asyncdapo.replay.core.recovery import KnownWorker
from asyncdapo.replay.server.pace import Pace, relative, spread

LATE_TICKS = 2
SUSPECT_TICKS = 5
LOST_TICKS = 15
DESERTED_TICKS = 2 * LOST_TICKS
"""If all workers are silent for longer, none is expected back, and the run ends."""
MAX_UNLISTED = 2
"""One heartbeat may have crossed the lease or the evaluation request on its way."""
GAUGES = {
    "tokens": "rollout/tokens",
    "late_tokens": "replay/tokens_late",
    "probe_tokens": "replay/tokens_probe",
    "generate_time_s": "rollout/time/generate_s",
    "load_time_s": "rollout/time/load_s",
    "environment_time_s": "rollout/time/environment_s",
    "score_time_s": "rollout/time/score_s",
    "send_time_s": "rollout/time/send_s",
    "lease_time_s": "rollout/time/lease_s",
    "running_s": "rollout/running_s",
    "waiting_s": "rollout/waiting_s",
    "unsent_s": "rollout/unsent_s",
    "preemptions": "rollout/preemptions",
    "cpu_s": "rollout/cpu_s",
    "verifier_busy_s": "reward/time/busy_s",
    "verifier_idle_s": "reward/time/idle_s",
    "verifier_queue_s": "reward/queue_s",
    "environment_s": "environment/wait_s",
    "environment_timeouts": "environment/timeouts",
    "environment_repeats": "environment/repeats",
    "host_restarts": "environment/host_restarts",
    "endpoint_calls": "environment/calls",
    "refused_calls": "environment/refused_calls",
    "overridden_calls": "environment/overridden_calls",
}
"""Counters of a worker, as metrics. They are summed over all workers and all their sessions."""
ALWAYS = tuple(name for name in GAUGES.values() if name.startswith(("rollout/", "replay/")))
"""Those of every worker; the others are of verifiers or environments."""


@dataclass(kw_only=True)
class HeldLease:
    """A running lease, as the server remembers it."""

    prompt: Prompt
    worker: int
    attempt: int
    number: int = 0
    """As in the `Lease` message."""
    progress_tick: int
    """Tick of its grant or of its latest progress."""
    num_tokens: int = 0
    num_unlisted: int = 0
    """Heartbeats of its worker in a row that didn't list it."""
    started: bool = False
    """Whether the core knows the version that sampled its first token."""


@dataclass
class Findings:
    """What a heartbeat says of leases that the server did not know."""

    over: list[int]
    """The worker holds them, but they are over."""
    unlisted: list[int]
    """The worker doesn't know them."""
    started: list[tuple[int, int]]
    """Lease and the version that sampled its first token."""


@dataclass(kw_only=True)
class Session:
    """One life of one worker process."""

    worker: int
    name: str
    peer: bytes = b""
    """Empty until it has said hello to this server."""
    loaded_version: int
    branch: int
    """Of the loaded weights. After a rollback it is behind the run's until the worker joins again."""
    heard_tick: int
    alive: bool = False
    """Whether the worker has joined: it isn't silent, and its weights are of the run's branch."""
    asked: int = 0
    granted: int = 0
    gauges: dict[str, float] = field(default_factory=dict)
    continues: bool = False
    """Whether it continues what others have sampled in part."""
    counted_before: bool = False
    """The totals already contain the counters of its first heartbeat."""
    num_stalled: int = 0
    """Leases in a row that stalled here."""
    leaving: bool = False
    """It is being drained, or was: it gets nothing more, and doesn't join again."""
    pace: Pace = field(default_factory=Pace)
    relative_pace: float = 1.0
    """Speed of its sequences as a share of the mean of those that live, as of the latest tick."""

    @property
    def owed(self) -> int:
        """Leases and evaluation requests that it can start now."""
        return max(0, self.asked - self.granted)


class Sessions:
    """Sessions by peer and by worker, and the leases they hold."""

    def __init__(self, stall_ticks: float, totals: Mapping[str, float] | None = None) -> None:
        """`stall_ticks`: ticks without progress after which a lease is stalled. `totals`: earlier sums of the gauges,
        by `rollout/` metric."""
        self.stall_ticks = stall_ticks
        self._by_peer: dict[bytes, Session] = {}
        self._by_worker: dict[int, Session] = {}
        before = dict.fromkeys(ALWAYS, 0.0) | dict(totals or {})
        self._past_gauges = Counter({gauge: before[name] for gauge, name in GAUGES.items() if name in before})
        self.leases: dict[int, HeldLease] = {}
        self.tick = 0

    def of_peer(self, peer: bytes) -> Session | None:
        """The session that this peer speaks for; None for a stranger."""
        return self._by_peer.get(peer)

    def of_worker(self, worker: int) -> Session | None:
        return self._by_worker.get(worker)

    @property
    def known(self) -> list[Session]:
        """The latest session of every worker, alive or lost."""
        return list(self._by_worker.values())

    @property
    def live(self) -> list[Session]:
        return [session for session in self.known if session.alive]

    def is_late(self, session: Session) -> bool:
        """Whether it has missed heartbeats: it may be stopped or gone."""
        return self.tick - session.heard_tick > LATE_TICKS

    @property
    def suspected(self) -> list[int]:
        """Workers that have been silent for a while."""
        return [session.worker for session in self.live if self.tick - session.heard_tick > SUSPECT_TICKS]

    @property
    def lost(self) -> list[int]:
        """Workers that have been silent for so long that they count as lost, and whose death wasn't reported."""
        return [session.worker for session in self.known if self.tick - session.heard_tick > LOST_TICKS]

    def held_by(self, worker: int) -> dict[int, HeldLease]:
        return {lease_id: lease for lease_id, lease in self.leases.items() if lease.worker == worker}

    def holds(self, session: Session, lease_id: int) -> bool:
        """Whether the lease is running, and this session's worker's."""
        lease = self.leases.get(lease_id)
        return lease is not None and lease.worker == session.worker

    def total(self, gauge: str) -> float:
        """Sum of one of `GAUGES` over all sessions so far, from their heartbeats."""
        return self._past_gauges[gauge] + sum(session.gauges.get(gauge, 0.0) for session in self._by_worker.values())

    def totals(self) -> dict[str, float]:
        """The metrics of `GAUGES`, those that not every worker has, once one has them; and how fast workers are."""
        known = self._past_gauges.keys() | {gauge for session in self._by_worker.values() for gauge in session.gauges}
        totals = {metric: self.total(gauge) for gauge, metric in GAUGES.items() if gauge in known}
        return totals | spread((session.worker, session.pace) for session in self.live)

    def count_tokens_from(self, num_tokens: int) -> None:
        """So many tokens are accounted for at the start. Those that workers of an earlier server are sampling come
        with their first heartbeats."""
        self._past_gauges["tokens"] = num_tokens

    # ------------------------------------------------------------------------------------------------- begin and end

    def recover(self, worker: int, known: KnownWorker, branch: int) -> None:
        """A session that the ledger knows, alive until it has been silent for too long."""
        self._by_worker[worker] = Session(
            worker=worker,
            name=known.session,
            loaded_version=known.loaded_version,
            continues=known.continues,
            branch=branch,
            heard_tick=self.tick,
            alive=True,
            counted_before=True,
        )

    def recognise(self, peer: bytes, hello: Hello) -> Session | None:
        """The session that says hello again, perhaps as another peer; None if it is new."""
        session = self._by_worker.get(hello.worker)
        if session is None or session.name != hello.session:
            return None
        self._unbind(session)
        session.peer = peer
        session.granted = max(session.granted, hello.granted)
        self._by_peer[peer] = session
        return session

    def begin(self, peer: bytes, hello: Hello) -> Session:
        """A new session in place of the worker's former one. It hasn't joined yet. If it has counted grants, it began
        under an earlier server."""
        if former := self._by_worker.get(hello.worker):
            self.forget(former)
        session = Session(
            worker=hello.worker,
            name=hello.session,
            peer=peer,
            loaded_version=hello.loaded_version,
            branch=hello.branch,
            heard_tick=self.tick,
            granted=max(0, hello.granted),
            continues=hello.continues,
            counted_before=hello.granted > 0,
        )
        self._by_worker[hello.worker] = self._by_peer[peer] = session
        return session

    def forget(self, session: Session) -> None:
        """The process is gone. Its counters stay in the totals."""
        self._unbind(session)
        del self._by_worker[session.worker]
        self._past_gauges.update(session.gauges)

    def _unbind(self, session: Session) -> None:
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]

    # ------------------------------------------------------------------------------------------- heartbeats and silence

    def note_heartbeat(self, session: Session, heartbeat: Heartbeat) -> Findings:
        """Update credits, gauges and progress."""
        session.asked = max(session.asked, heartbeat.asked)
        engine_moved = self._note_gauges(session, heartbeat)
        held = self.held_by(session.worker)
        findings = Findings([lease_id for lease_id in heartbeat.progress if lease_id not in held], [], [])
        for lease_id, lease in held.items():
            progress = heartbeat.progress.get(lease_id)
            if progress is None:
                lease.num_unlisted += 1
                if lease.num_unlisted % MAX_UNLISTED == 0:
                    findings.unlisted.append(lease_id)
                continue
            lease.num_unlisted = 0
            self._note_progress(lease, progress, engine_moved)
            if progress.started_version is not None and not lease.started:
                findings.started.append((lease_id, progress.started_version))
        return findings

    def note_answer(self, session: Session, num_tokens: int) -> None:
        """A group or an answer has arrived, with so many tokens that no heartbeat had yet. The next one has them; the
        worker may die before it."""
        session.gauges["tokens"] = session.gauges.get("tokens", 0.0) + num_tokens

    def _note_gauges(self, session: Session, heartbeat: Heartbeat) -> bool:
        """Update the gauges. Returns whether the worker's engine has sampled a token since the last heartbeat."""
        gauges, tokens_before = heartbeat.gauges, session.gauges.get("tokens", 0.0)
        session.gauges = {name: gauges[name] for name in GAUGES if math.isfinite(gauges.get(name, math.nan))}
        if session.counted_before:
            self._past_gauges.subtract(session.gauges)
            known = {lease_id: lease.num_tokens for lease_id, lease in self.held_by(session.worker).items()}
            running = sum(
                progress.num_tokens - known.get(lease_id, 0) for lease_id, progress in heartbeat.progress.items()
            )
            self._past_gauges["tokens"] += int(tokens_before) + running
            session.counted_before = False
        else:  # an answer may have been ahead of a heartbeat that was sent before it
            session.gauges["tokens"] = max(tokens_before, session.gauges.get("tokens", 0.0))
        session.pace.note(heartbeat.gauges | session.gauges)
        return session.gauges.get("tokens", 0.0) > tokens_before

    def _note_progress(self, lease: HeldLease, progress: Progress, engine_moved: bool) -> None:
        grown = progress.num_tokens > lease.num_tokens
        if grown or progress.phase in ("sampled", "environment") or (progress.phase == "waiting" and engine_moved):
            lease.progress_tick = self.tick
        lease.num_tokens = max(lease.num_tokens, progress.num_tokens)

    def compare_paces(self) -> None:
        """Of those that live. At every tick, and not at every heartbeat: with many workers these are many."""
        live = self.live
        for session, pace in zip(live, relative(session.pace for session in live), strict=True):
            session.relative_pace = pace

    def silent(self) -> list[Session]:
        """Live sessions that have been silent for so long that they count as lost."""
        return [session for session in self.live if self.tick - session.heard_tick > LOST_TICKS]

    @property
    def deserted(self) -> bool:
        """Whether there are workers, and all have been silent for long."""
        return bool(self._by_worker) and all(
            self.tick - session.heard_tick > DESERTED_TICKS for session in self._by_worker.values()
        )

    def stalled(self) -> list[int]:
        """Leases without progress. None is of a lost worker, since those are over."""
        return [
            lease_id for lease_id, lease in self.leases.items() if self.tick - lease.progress_tick >= self.stall_ticks
        ]
