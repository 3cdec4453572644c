"""The life of a prompt: its states, and the attempts that it costs. Ensures that every prompt ends exactly once.

In: what happened to a prompt or its group. Out: `MovePrompt` and `MoveGroup` actions.

    waiting ──lease──▶ leased ──group──▶ queued ──cut──▶ cut ──▶ trained
       ▲                 │  ╲             │              ▲
       │                 │   ▶ spare ─────┼──────────────┘       ends: trained filtered expired failed retired unused
       └───comes back────┴───────┴────────┘

A prompt is in one of these states. Every change goes through `move`, which refuses changes that aren't in `MOVES`.
Ends are final. A prompt that was never leased is `waiting` and has no row anywhere.

A lease costs an attempt if it ended lost or rejected, or, under `on_stale: requeue`, withdrawn or expired. A prompt
that has used up its attempts ends `failed`. Surplus, a worker that is drained and rollback cost no attempt.

Does not own: when something is lost, stale or cut (`state.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

from asyncdapo.replay.core.batch import HeldGroup
from asyncdapo.replay.core.events import Action, GroupState, MoveGroup, MovePrompt, PromptState
from asyncdapo.replay.core.stream import PromptStream

MOVES: dict[PromptState, frozenset[PromptState]] = {
    "waiting": frozenset({"leased", "retired", "unused"}),
    "leased": frozenset({"queued", "spare", "filtered", "expired", "failed", "waiting", "unused"}),
    "queued": frozenset({"cut", "expired", "failed", "waiting", "unused"}),
    "spare": frozenset({"cut", "filtered", "expired", "failed", "waiting", "unused"}),
    "cut": frozenset({"trained", "unused"}),
}
"""The states that may follow each state. States that aren't listed are ends."""


class Lifecycle:
    """State and attempts of every prompt that was leased and hasn't ended."""

    def __init__(
        self,
        stream: PromptStream,
        prompts: Mapping[int, tuple[PromptState, int]],
        do: Callable[[Action], None],
        drop_partial: Callable[[int, str], None],
        max_attempts: int,
        on_stale: Literal["auto", "drop", "requeue", "wait"],
    ) -> None:
        """`prompts`: state and attempts of those that a former process leased and that haven't ended. `do` takes the
        actions. `drop_partial`: what is saved of a prompt, when it ends, and why."""
        self._stream = stream
        self._max_attempts = max_attempts
        self._on_stale = on_stale
        self._do, self._drop_partial = do, drop_partial
        self._states: dict[int, PromptState] = {prompt_id: state for prompt_id, (state, _) in prompts.items()}
        self._attempts = Counter({prompt_id: attempts for prompt_id, (_, attempts) in prompts.items()})

    @property
    def unended(self) -> dict[int, tuple[PromptState, int]]:
        """State and attempts of the prompts that were leased and haven't ended, in rising `prompt_id`."""
        return {prompt_id: (self._states[prompt_id], self._attempts[prompt_id]) for prompt_id in sorted(self._states)}

    def next_attempt(self, prompt_id: int) -> int:
        """The number of the prompt's next lease, from 1. Surplus leases don't count."""
        return self._attempts[prompt_id] + 1

    def move(
        self,
        prompt_id: int,
        state: PromptState,
        *,
        step: int | None = None,
        reason: str = "",
        place: int | None = None,
    ) -> None:
        """The prompt is in `state` from now on. Raises AssertionError for a move that is not in `MOVES`."""
        before: PromptState = self._states.get(prompt_id, "waiting")
        assert state in MOVES[before], f"prompt {prompt_id} can't go from {before} to {state}"
        attempts = self._attempts[prompt_id]
        self._do(MovePrompt(prompt_id=prompt_id, state=state, attempts=attempts, step=step, reason=reason, place=place))
        self._states[prompt_id] = state
        if state not in MOVES:
            del self._states[prompt_id], self._attempts[prompt_id]
            self._drop_partial(prompt_id, reason)

    def move_group(self, group: HeldGroup, state: GroupState, *, step: int | None = None, reason: str = "") -> None:
        """The group is in `state` from now on. Its prompt is moved separately."""
        self._do(
            MoveGroup(
                group_id=group.group_id,
                prompt_id=group.prompt_id,
                state=state,
                verdict=group.verdict,
                step=step,
                reason=reason,
            )
        )

    def move_both(
        self,
        group: HeldGroup,
        state: Literal["queued", "spare", "cut", "trained", "filtered"],
        *,
        step: int | None = None,
        reason: str = "",
    ) -> None:
        """The group and its prompt are in `state` from now on."""
        self.move_group(group, state, step=step, reason=reason)
        self.move(group.prompt_id, state, step=step, reason=reason)

    def lose(self, prompt_id: int, reason: str) -> None:
        """Its lease ended without a group: sample it again, after others."""
        self._try_again(prompt_id, reason, self._stream.put_behind)

    def expire(self, prompt_id: int) -> None:
        """Its lease or group would miss the staleness bound: end it, or under `requeue` sample it again at once."""
        if self._on_stale != "requeue":
            self.move(prompt_id, "expired", reason="stale")
        else:
            self._try_again(prompt_id, "stale", self._stream.put_back)

    def give_back(self, group: HeldGroup) -> None:
        """Drop the group and put its prompt back in its own place, as if it had never been leased."""
        reason = "behind the last member"
        self.move_group(group, "surplus", reason=reason)
        self.hand_back(group.prompt_id, reason)

    def hand_back(self, prompt_id: int, reason: str) -> None:
        """Put the prompt back in its own place. It costs no attempt."""
        self.move(prompt_id, "waiting", reason=reason, place=self._stream.put_back(prompt_id))

    def _try_again(self, prompt_id: int, reason: str, put: Callable[[int], int]) -> None:
        """Charge an attempt. If one is left, the prompt waits again, in the place that `put` gives it."""
        self._attempts[prompt_id] += 1
        if self._attempts[prompt_id] < self._max_attempts:
            self.move(prompt_id, "waiting", reason=reason, place=put(prompt_id))
        else:
            self.move(prompt_id, "failed", reason=reason)
