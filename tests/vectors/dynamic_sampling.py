"""Dynamic sampling, driven through the whole state machine of the replay server.

A step takes the first B kept groups in order of arrival, the surplus opens the next step, and the limit of generation
batches raises, cuts short or fills up. Here prompt ids are the order of arrival, one worker has credits without end,
`run_ahead` and `max_staleness` are large, and one `BatchWanted` is pending at all times. All that is compared is read
from the actions that the state machine answers with.
"""

from __future__ import annotations

from typing import Any

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core.events import (
    VERDICT_STATES,
    Action,
    BatchWanted,
    CloseGenBatch,
    CutBatch,
    Event,
    GenBatchClosed,
    GrantLease,
    GroupArrived,
    GroupState,
    MoveGroup,
    Ready,
    StopRun,
    WorkerJoined,
)
from asyncdapo.replay.core.filter import Verdict
from asyncdapo.replay.core.state import ReplayState
from tests.vectors.file import Inputs, MisunderstoodError

ERRORS = {"filter.max_gen_batches": "max_num_gen_batches"}
"""Our reason to end a run, up to its colon, and the vectors' name of it."""
PLENTY = 1000


class Replayed:
    """A state machine that is fed verdicts, and what it made of them, by the names of the vector."""

    def __init__(self, batch_groups: int, max_num_gen_batches: int, on_limit: str) -> None:
        self._state = ReplayState(
            ReplayConfig(prompts_per_step=batch_groups, run_ahead=PLENTY, max_staleness=PLENTY),
            FilterConfig(max_gen_batches=max_num_gen_batches, gen_batch_multiplier=PLENTY, on_limit=on_limit),
            max_attempts=1,
            num_prompts=None,
        )
        self.error: str | None = None
        self.prompts_consumed = 0
        self._batches: list[CutBatch] = []
        self._gen_batches: list[GenBatchClosed] = []
        self._names: dict[int, str] = {}
        self._states: dict[int, GroupState] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._leases: list[int] = []
        self._tell(WorkerJoined(worker=0, loaded_version=0))
        self._tell(Ready(worker=0, credits=PLENTY))
        self._tell(BatchWanted(step=1))

    def arrive(self, name: str, kept: bool) -> None:
        """The group of the oldest lease is done."""
        lease_id = self._leases.pop(0)
        self._names[lease_id] = name
        acc = (0.0, 1.0) if kept else (1.0, 1.0)
        self._tell(
            GroupArrived(lease_id=lease_id, min_version=0, max_version=0, metrics={"acc": acc}, num_loss_tokens=1)
        )

    def close_gen_batch(self) -> None:
        self._tell(CloseGenBatch())

    def _tell(self, event: Event) -> None:
        for action in self._state.handle(event):
            self._note(action)

    def _note(self, action: Action) -> None:
        match action:
            case GrantLease():
                self._leases.append(action.lease_id)
            case MoveGroup():
                self.prompts_consumed += action.group_id not in self._states and action.state in VERDICT_STATES
                self._states[action.group_id] = action.state
                self._verdicts[action.group_id] = action.verdict
            case CutBatch():
                self._batches.append(action)
                self._tell(BatchWanted(step=action.step + 1))
            case GenBatchClosed():
                self._gen_batches.append(action)
            case StopRun():
                self.error = ERRORS[action.reason.split(":")[0]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Members of each batch in order of arrival, but those that only fill it up last."""
        steps = []
        for batch in self._batches:
            kept = [group_id for group_id in batch.group_ids if self._verdicts[group_id] == "kept"]
            fill = [group_id for group_id in batch.group_ids if self._verdicts[group_id] != "kept"]
            steps.append(
                {
                    "groups": [self._names[group_id] for group_id in kept + fill],
                    "unfiltered_fill": [self._names[group_id] for group_id in fill],
                    "gen_batches_used": sum(closed.step == batch.step for closed in self._gen_batches),
                }
            )
        return steps

    @property
    def surplus(self) -> list[str]:
        """Kept groups that wait for the next batch, in order of arrival."""
        return [self._names[group_id] for group_id, state in self._states.items() if state == "queued"]

    @property
    def counters(self) -> dict[str, int]:
        return {
            "gen_batches": len(self._gen_batches),
            "prompts_consumed": self.prompts_consumed,
            "train_steps": len(self._batches),
        }


def check_dynamic_sampling(inputs: Inputs) -> dict[str, Any]:
    on_limit = inputs.one_of("on_limit", ("raise", "partial", "unfiltered"))
    replayed = Replayed(inputs["batch_groups"], inputs["max_num_gen_batches"], on_limit)
    for gen_batch in inputs["gen_batches"]:
        for group in gen_batch:
            if group.keys() != {"id", "kept"}:
                raise MisunderstoodError(f"a group of input 'gen_batches' has {sorted(group)}, known are id and kept")
            replayed.arrive(group["id"], group["kept"])
        replayed.close_gen_batch()
        if replayed.error:
            break
    return {
        "steps": replayed.steps,
        "surplus": replayed.surplus,
        "counters": replayed.counters,
        "error": replayed.error,
    }
