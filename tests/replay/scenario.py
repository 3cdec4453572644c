"""Plays a short story to the core, in few words; `Truth` watches over every event of it."""

from __future__ import annotations

from collections.abc import Sequence

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.state import ReplayState
from tests.replay.truth import Truth

ACC = {"kept": (0.0, 1.0), "constant": (1.0, 1.0), "masked": (0.0, 1.0)}


def group_done(lease_id: int, verdict: str = "kept", min_version: int = 0, max_version: int = 0) -> core.GroupArrived:
    """A group of two completions that the filter gives this verdict."""
    return core.GroupArrived(
        lease_id=lease_id,
        min_version=min_version,
        max_version=max(min_version, max_version),
        metrics={"acc": ACC[verdict]},
        num_loss_tokens=0 if verdict == "masked" else 7,
    )


class Scenario:
    """A state, its truth, and the leases by the prompt they are for."""

    def __init__(
        self,
        replay: ReplayConfig,
        filter: FilterConfig | None = None,
        *,
        max_attempts: int = 3,
        num_prompts: int | None = None,
    ) -> None:
        filter = filter or FilterConfig()
        self.state = ReplayState(replay, filter, max_attempts=max_attempts, num_prompts=num_prompts)
        self.truth = Truth(replay, filter, max_attempts=max_attempts, num_prompts=num_prompts)
        self.actions: list[core.Action] = []
        """Everything so far."""

    def tell(self, *events: core.Event) -> list[core.Action]:
        """Returns the actions of these events."""
        before = len(self.actions)
        for event in events:
            actions = self.state.handle(event)
            self.actions += actions
            self.truth.observe(event, actions)
        return self.actions[before:]

    def join(self, worker: int = 0, *, version: int = 0, credits: int = 0) -> list[core.Action]:
        return self.tell(
            core.WorkerJoined(worker=worker, loaded_version=version), core.Ready(worker=worker, credits=credits)
        )

    def lease_of(self, prompt_id: int) -> int:
        """The running lease of a prompt."""
        return next(i for i, lease in self.truth.leases.items() if lease.prompt_id == prompt_id)

    def finish(self, *prompt_ids: int, verdict: str = "kept", version: int = 0) -> list[core.Action]:
        before = len(self.actions)
        for prompt_id in prompt_ids:
            self.tell(group_done(self.lease_of(prompt_id), verdict, version))
        return self.actions[before:]

    def train(self, step: int) -> list[core.Action]:
        """The batch is trained on and its version published."""
        return self.tell(core.Trained(step=step), core.Published(version=step))

    @property
    def running(self) -> list[int]:
        """Prompts whose lease runs, in rising order."""
        return sorted(lease.prompt_id for lease in self.truth.leases.values())

    @property
    def batches(self) -> list[list[int]]:
        """Prompts of each batch so far."""
        return [[self.truth.groups[i].prompt_id for i in members] for members in self.truth.batches.values()]

    def state_of(self, prompt_id: int) -> str:
        return self.truth.prompts[prompt_id]

    def reasons(self, prompt_id: int) -> list[tuple[str, str]]:
        """States of a prompt in order, with their reasons."""
        return [(a.state, a.reason) for a in moves_of(self.actions) if a.prompt_id == prompt_id]


def moves_of(actions: Sequence[core.Action]) -> list[core.MovePrompt]:
    return [action for action in actions if isinstance(action, core.MovePrompt)]


def grants_of(actions: Sequence[core.Action]) -> list[core.GrantLease]:
    return [action for action in actions if isinstance(action, core.GrantLease)]


def stop_of(actions: Sequence[core.Action]) -> core.StopRun | None:
    return next((action for action in actions if isinstance(action, core.StopRun)), None)
