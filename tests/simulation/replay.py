"""The product's replay server in a process of its own, between simulated sockets.

In: the ledger, messages, commands. Out: messages, and to the judge every event that is committed, the state at the
moment of death and the one with which the next life begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Lease, Prompt
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.server.server import ReplayServer
from asyncdapo.replay.server.settings import ServerSettings
from tests.replay.restarts import snapshot
from tests.simulation.plan import GROUP_SIZE
from tests.simulation.process import CURRENT, Killed, Process

if TYPE_CHECKING:
    from tests.simulation.world import World

ROLLOUT_ADDRESS, LEARNER_ADDRESS = "tcp://replay:1", "tcp://replay:2"


class WatchedJournal(Journal):
    """The product's, which tells the judge what was committed, and which a dead process can't write."""

    def write(self, event: Any, actions: Any, **extras: Any) -> None:
        with self.together():
            super().write(event, actions, **extras)
            CURRENT.get().written.append((event, list(actions)))

    @contextmanager
    def together(self) -> Iterator[None]:
        process = CURRENT.get()
        cut_off = process.in_event and not self._db.in_transaction  # killed in it; the loop has yet to hear of that
        if cut_off or not process.alive:
            raise Killed("writes after its death")
        if process.in_event:
            yield
            return
        process.in_event = True
        try:
            with super().together():
                yield
        except Killed as killed:
            if killed.point == "after_commit":
                going_back = process.rolled_back_to is not None
                process.committed()
                process.in_event = going_back  # the core's state is still that of before
            raise
        process.committed()

    def roll_back(self, step: int, reason: str, config: Any, *, replaces: bool) -> None:
        with self.together():
            super().roll_back(step, reason, config, replaces=replaces)
            CURRENT.get().rolled_back_to = step


class Replay(Process):
    """The product's replay server between simulated sockets."""

    role = "replay"

    def __init__(self, world: World, roll_back_to: int | None) -> None:
        super().__init__(world, "replay")
        self.in_event = False
        self.written: list[tuple[Any, Any]] = []
        """Events of the transaction that is not committed yet."""
        self.rolled_back_to: int | None = None
        """Where it goes back to, if it does."""
        self.server: ReplayServer = self.inside(self._open, roll_back_to)
        if roll_back_to is None:
            world.judge.reloaded(self.server._dispatch.state)
        self.serving = self.spawn(self.server.run())
        self.serving.add_done_callback(self._note_failure)

    def _open(self, roll_back_to: int | None) -> ReplayServer:
        world, plan = self.world, self.world.plan
        self.journal = world.disk.open_journal(WatchedJournal)
        try:
            if roll_back_to is not None:
                self.journal.roll_back(roll_back_to, "resumed", plan.replay, replaces=plan.filter.replaces)
            return ReplayServer(
                ServerSettings(
                    replay=plan.replay,
                    group_size=GROUP_SIZE,
                    seed=plan.seed,
                ),
                self._make_state,
                self.journal,
                prompt_at,
                ports=(1, 2),
            )
        except Killed:
            self.die("while it was opened")
            raise

    def _make_state(self, recovered: Any) -> ReplayState:
        plan = self.world.plan
        return ReplayState(
            plan.replay,
            plan.filter,
            max_attempts=plan.max_attempts,
            num_prompts=plan.num_prompts,
            recovered=recovered,
        )

    def _note_failure(self, task: asyncio.Task) -> None:
        if self.alive and not task.cancelled() and task.exception():
            self.world.fail(task.exception())

    def committed(self) -> None:
        self.in_event = False
        if self.rolled_back_to is not None:
            self.world.judge.rolled_back(self.rolled_back_to, self.journal.branch)
            self.rolled_back_to = None
        for event, actions in self.written:
            self.world.judge.observe(event, actions)
        self.written.clear()

    def note_grant(self, peer: bytes, message: Lease | EvalRequest) -> None:
        self.world.judge.sent(self.server._sessions.of_peer(peer), message)

    def die(self, why: str) -> None:
        if self.alive and hasattr(self, "server") and not self.world.over:
            state = None if self.in_event else snapshot(self.server._dispatch.state)
            self.world.judge.died(state)
        super().die(why)
        self.journal.close()


def prompt_at(prompt_id: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, epoch=0, source="test", row=prompt_id, token_ids=[prompt_id], answer="")
