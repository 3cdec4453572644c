"""No silent waits: what each process waits for, and the chain from a long wait to its root.

    Waits    one registry per process: `with waits.on("learner", "batch 5"):` around each step that may take long
    chain    pure: follows the waits of all processes to the processes that wait for nobody
    render   the chain, one line a link:
                 controller waits for learner since 34 s: batch 5
                 learner waits for replay since 33 s: batch 5
                 replay waits for rollout since 12 s: 17 running, 3 of 16 ready
                 rollout-0: 17 sequences running, last token 11 s ago
    Stall    pure: for how long no counter of progress has moved

In: waits, as plain records that travel in Ray replies, in seconds passed, since clocks of two processes can't be
compared. Out: text and numbers; what is done about a stall is the controller's. Invariant: `chain` shows every process
once, and ends on every list of waits, circles among them.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from asyncdapo.accounting.spans import Span, SpanRing

NOBODY = ""
"""The process works or is idle, and waits for nobody; `what` says which."""
UNKNOWN = "?"
"""The process doesn't say whom it waits for."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """One process waits for another."""

    who: str
    whom: str
    """A process (`rollout-1`), a role (`rollout`: any process of it), NOBODY or UNKNOWN."""
    what: str
    waited_s: float = 0.0
    """Seconds so far, when it was collected."""
    deadline_s: float | None = None
    """Seconds after its beginning at which it fails; None for work of unknown length."""

    @property
    def is_root(self) -> bool:
        """Whether the chain ends here: it is this process's turn."""
        return self.whom in (NOBODY, UNKNOWN)


@dataclass(frozen=True)
class _Open:
    whom: str
    what: str
    since: float
    deadline_s: float | None


class Waits:
    """The open waits of one process, threads included."""

    def __init__(self, who: str, now: Callable[[], float] = time.monotonic) -> None:
        self.who, self._now = who, now
        self._open: dict[object, _Open] = {}
        self._standing: _Open | None = None
        self._over = SpanRing()
        self._lock = threading.Lock()

    @contextmanager
    def on(self, whom: str, what: str, deadline_s: float | None = None) -> Iterator[None]:
        """Record a wait for `whom` while the body runs. The deadline is shown, not enforced."""
        key, wait = object(), _Open(whom, what, self._now(), deadline_s)
        with self._lock:
            self._open[key] = wait
        try:
            yield
        finally:
            with self._lock:
                del self._open[key]
                self._over.add(Span(f"{whom}: {what}" if whom else what, wait.since, self._now()))

    def stand(self, whom: str, what: str) -> None:
        """For a process that is a state machine: replaces the wait recorded by the last call. The clock keeps running
        if `whom` stays the same."""
        with self._lock:
            before = self._standing
            since = before.since if before and before.whom == whom else self._now()
            self._standing = _Open(whom, what, since, None)

    def take_spans(self) -> list[Span]:
        """Those of `on` that ended since the `take_spans` before, with whom and what was waited for."""
        with self._lock:
            return self._over.take()

    def open(self) -> list[Wait]:
        """All of them, the oldest first."""
        with self._lock:
            waits = [*self._open.values(), *([self._standing] if self._standing else [])]
        now = self._now()
        return [
            Wait(who=self.who, whom=wait.whom, what=wait.what, waited_s=now - wait.since, deadline_s=wait.deadline_s)
            for wait in sorted(waits, key=lambda wait: wait.since)
        ]


# ---------------------------------------------------------------------------------------------------------------- chain

REPLAY_WAITS_FOR = {
    "learner": "learner",
    "rollout": "rollout",
    "weights": "controller",  # which publishes them
    "no live worker": "rollout",  # one of which is being started, or has yet to join
    "run over": NOBODY,
}
"""Whom each reason of `replay/core/waits.py` means, by the name it starts with."""


def replay_wait(why: str) -> tuple[str, str]:
    """From the line in which the replay server names its wait: whom it waits for, and for what (see `Waits.stand`)."""
    name = next(name for name in REPLAY_WAITS_FOR if why.startswith(name))
    return REPLAY_WAITS_FOR[name], why.removeprefix(f"{name}: ")


def chain(waits_by_process: Mapping[str, Sequence[Wait] | None], start: str) -> list[Wait]:
    """Whom `start` waits for, whom those wait for, and so on: each process once, right after the first that waits for
    it.

    None in place of a process's waits means that it did not answer. A wait for a role shows all processes of the role.
    A process that waits for nobody gets a link that says so: these are the roots.
    """
    links: list[Wait] = []
    shown: set[str] = set()

    def follow(who: str) -> None:
        shown.add(who)
        for wait in _waits_of(who, waits_by_process):
            links.append(wait)
            if not wait.is_root:
                for whom in _processes(wait.whom, waits_by_process):
                    if whom not in shown:
                        follow(whom)

    follow(start)
    return links


def _waits_of(who: str, waits_by_process: Mapping[str, Sequence[Wait] | None]) -> Sequence[Wait]:
    """At least one."""
    if who not in waits_by_process:
        return [Wait(who=who, whom=UNKNOWN, what="there is no such process")]
    waits = waits_by_process[who]
    if waits is None:
        return [Wait(who=who, whom=UNKNOWN, what="does not answer")]
    return waits or [Wait(who=who, whom=NOBODY, what="waits for nobody")]


def _processes(whom: str, names: Mapping[str, object]) -> list[str]:
    """The processes that a name stands for, by their numbers."""
    members = [name for name in names if re.fullmatch(rf"{re.escape(whom)}-\d+", name)]
    alone = [whom] if whom in names or not members else []  # `learner`, rank 0 of the processes of this name
    return alone + sorted(members, key=lambda name: int(name.rpartition("-")[2]))


def render(links: Sequence[Wait]) -> str:
    """One line a link. If the chain has no root, the processes wait for each other, and a last line says so."""
    lines = [_line(wait) for wait in links]
    if not any(wait.is_root for wait in links):
        lines.append(f"{', '.join(processes_in(links))} wait for each other: none of them can continue")
    return "\n".join(lines)


def processes_in(links: Sequence[Wait]) -> list[str]:
    """The processes of a chain, in its order: those whose stacks are worth seeing."""
    return list(dict.fromkeys(wait.who for wait in links))


def _line(wait: Wait) -> str:
    if wait.is_root:
        return f"{wait.who}: {wait.what}"
    deadline = "" if wait.deadline_s is None else f" (deadline {wait.deadline_s:.0f} s)"
    return f"{wait.who} waits for {wait.whom} since {wait.waited_s:.0f} s{deadline}: {wait.what}"


# ---------------------------------------------------------------------------------------------------------------- stall


class Stall:
    """Watches counters of progress: sampled tokens, groups, micro-batches, steps, transfers."""

    def __init__(self, now: float) -> None:
        self._moved_at = now
        self._last: dict[str, float] = {}

    def feed(self, now: float, progress: Mapping[str, float]) -> float:
        """Seconds since a counter moved, up or (of a restarted process) down.

        A counter that is missing, since its process did not answer, has not moved; neither has one that comes back
        unchanged, or is new and 0.
        """
        if any(value != self._last.get(name, 0) for name, value in progress.items()):
            self._moved_at = now
        self._last.update(progress)
        return now - self._moved_at

    def reset(self, now: float) -> None:
        """Something that no counter shows has happened: a process was restarted, a checkpoint written."""
        self._moved_at = now
