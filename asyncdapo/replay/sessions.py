"""Who is connected, what they hold, and who has fallen silent. No sockets; time is counted in ticks.

In: hellos, heartbeats, leases granted and ended, ticks. Out: the session of a peer, credits owed, silent workers and
stalled leases. A tick is one heartbeat interval as the server itself lived it: while the server is stopped nobody
grows silent, so that its own pause is not taken for the death of its workers.

A worker has one session at a time; a newer one puts the older out, and its peer is a stranger from then on. A session
whose worker was lost for silence stays, and lives again with the next heartbeat.
Does not own: what follows from a loss (the core), evaluation requests (`evaluations`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from asyncdapo.messages import Heartbeat, Hello, Prompt

SUSPECT_TICKS = 5
LOST_TICKS = 15


@dataclass(kw_only=True)
class HeldLease:
    """A lease that is not over, as the server remembers it."""

    prompt: Prompt
    worker: int
    attempt: int
    progress_tick: int
    """When it was granted, or when its number of tokens last grew."""
    num_tokens: int = 0


@dataclass(kw_only=True)
class Session:
    """One life of one worker process."""

    worker: int
    name: str
    peer: bytes
    loaded_version: int
    heard_tick: int
    alive: bool = False
    """Whether the core counts on it."""
    asked: int = 0
    granted: int = 0
    gauges: dict[str, float] = field(default_factory=dict)

    @property
    def owed(self) -> int:
        """Leases and evaluation requests that it can start now."""
        return max(0, self.asked - self.granted)


class Sessions:
    """Sessions by peer and by worker, and the leases they hold."""

    def __init__(self, stall_ticks: float) -> None:
        """`stall_ticks`: ticks without a new token after which a lease is stalled."""
        self.stall_ticks = stall_ticks
        self._by_peer: dict[bytes, Session] = {}
        self._by_worker: dict[int, Session] = {}
        self._past_gauges: Counter[str] = Counter()
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

    @property
    def suspected(self) -> list[int]:
        """Workers that have been silent for a while."""
        return [session.worker for session in self.live if self.tick - session.heard_tick > SUSPECT_TICKS]

    def total(self, gauge: str) -> float:
        """Sum of a cumulative gauge over all sessions so far, as their heartbeats say."""
        return self._past_gauges[gauge] + sum(session.gauges.get(gauge, 0.0) for session in self._by_worker.values())

    def recognise(self, peer: bytes, hello: Hello) -> Session | None:
        """The session that says hello again (perhaps as another peer); None when it is a new one."""
        session = self._by_worker.get(hello.worker)
        if session is None or session.name != hello.session:
            return None
        self._unbind(session)
        session.peer = peer
        self._by_peer[peer] = session
        return session

    def begin(self, peer: bytes, hello: Hello) -> Session:
        """A new session, in place of the worker's former one. It has yet to join."""
        former = self._by_worker.pop(hello.worker, None)
        if former is not None:
            self._unbind(former)
            self._past_gauges.update(former.gauges)
        session = Session(
            worker=hello.worker,
            name=hello.session,
            peer=peer,
            loaded_version=hello.loaded_version,
            heard_tick=self.tick,
        )
        self._by_worker[hello.worker] = self._by_peer[peer] = session
        return session

    def _unbind(self, session: Session) -> None:
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]

    def note_heartbeat(self, session: Session, heartbeat: Heartbeat) -> list[int]:
        """Take in credits, gauges and progress. Returns leases that the worker holds and that are over."""
        session.asked = max(session.asked, heartbeat.asked)
        session.gauges = heartbeat.gauges
        over = []
        for lease_id, num_tokens in heartbeat.progress.items():
            lease = self.leases.get(lease_id)
            if lease is None or lease.worker != session.worker:
                over.append(lease_id)
            elif num_tokens > lease.num_tokens:
                lease.num_tokens, lease.progress_tick = num_tokens, self.tick
        return over

    def silent(self) -> list[Session]:
        """Live sessions that have been silent for so long that they count as lost."""
        return [session for session in self.live if self.tick - session.heard_tick > LOST_TICKS]

    def stalled(self) -> list[int]:
        """Leases without progress. Those of a lost worker are over, so that none of them is among these."""
        return [
            lease_id for lease_id, lease in self.leases.items() if self.tick - lease.progress_tick >= self.stall_ticks
        ]
