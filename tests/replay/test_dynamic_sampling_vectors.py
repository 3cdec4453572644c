"""Reference vectors of dynamic sampling, driven through the whole state machine.

Their formulas: a step takes the first B kept groups in order of arrival, the surplus opens the next step, and the limit
of generation batches raises, cuts short or fills up. Here prompt ids are the order of arrival, one worker has credits
without end, `run_ahead` and `max_staleness` are large, and one `CutWanted` is pending at all times.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.events import (
    Action,
    CloseGenBatch,
    CutBatch,
    CutWanted,
    Event,
    GenBatchClosed,
    GrantLease,
    GroupDone,
    Ready,
    StopRun,
    WorkerJoined,
)
from asyncdapo.replay.state import ReplayState

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "dapo_vectors.json").read_text())["vectors"]
DYNAMIC_SAMPLING = [vector for vector in VECTORS if vector["group"] == "dynamic_sampling"]
ERRORS = {"filter.max_gen_batches": "max_num_gen_batches"}


class Replayed:
    """A state that is fed lists of verdicts, and what it made of them, by the names of the vector."""

    def __init__(self, batch_groups: int, max_num_gen_batches: int, on_limit: str) -> None:
        self.state = ReplayState(
            ReplayConfig(prompts_per_step=batch_groups, run_ahead=1000, max_staleness=1000),
            FilterConfig(max_gen_batches=max_num_gen_batches, gen_batch_multiplier=1000, on_limit=on_limit),
            max_attempts=1,
            num_prompts=None,
        )
        self.batches: list[CutBatch] = []
        self.gen_batches: list[GenBatchClosed] = []
        self.error: str | None = None
        self.names: dict[int, str] = {}
        self._leases: list[int] = []
        self.tell(WorkerJoined(worker=0, loaded_version=0))
        self.tell(Ready(worker=0, credits=1000))
        self.tell(CutWanted(step=1))

    def tell(self, event: Event) -> None:
        for action in self.state.handle(event):
            self._note(action)

    def _note(self, action: Action) -> None:
        match action:
            case GrantLease():
                self._leases.append(action.lease_id)
            case CutBatch():
                self.batches.append(action)
                self.tell(CutWanted(step=action.step + 1))
            case GenBatchClosed():
                self.gen_batches.append(action)
            case StopRun():
                self.error = ERRORS[action.reason.split(":")[0]]

    def arrive(self, name: str, kept: bool) -> None:
        lease_id = self._leases.pop(0)
        self.names[lease_id] = name
        acc = (0.0, 1.0) if kept else (1.0, 1.0)
        self.tell(GroupDone(lease_id=lease_id, min_version=0, max_version=0, metrics={"acc": acc}, num_loss_tokens=1))


@pytest.mark.parametrize("vector", DYNAMIC_SAMPLING, ids=lambda vector: vector["name"])
def test_dynamic_sampling_agrees_with_the_reference(vector: dict) -> None:
    inputs, expected = vector["inputs"], vector["expected"]
    replayed = Replayed(inputs["batch_groups"], inputs["max_num_gen_batches"], inputs["on_limit"])
    kept_by_name, consumed = {}, 0
    for gen_batch in inputs["gen_batches"]:
        for group in gen_batch:
            kept_by_name[group["id"]] = group["kept"]
            replayed.arrive(group["id"], group["kept"])
            consumed += 1
        replayed.tell(CloseGenBatch())
        if replayed.error:
            break

    batches = [[replayed.names[group_id] for group_id in batch.group_ids] for batch in replayed.batches]
    assert [sorted(batch) for batch in batches] == [sorted(step["groups"]) for step in expected["steps"]]
    fills = [[name for name in batch if not kept_by_name[name]] for batch in batches]
    assert fills == [step["unfiltered_fill"] for step in expected["steps"]]
    used = [sum(closed.step == batch.step for closed in replayed.gen_batches) for batch in replayed.batches]
    assert used == [step["gen_batches_used"] for step in expected["steps"]]
    assert [replayed.names[group.group_id] for group in replayed.state.queued] == expected["surplus"]
    assert replayed.error == expected["error"]
    assert {
        "gen_batches": len(replayed.gen_batches),
        "prompts_consumed": consumed,
        "train_steps": len(batches),
    } == expected["counters"]


def test_a_run_that_stopped_at_its_limit_takes_in_what_still_runs_and_stops_once() -> None:
    replayed = Replayed(batch_groups=2, max_num_gen_batches=1, on_limit="raise")
    replayed.arrive("a", kept=False)
    replayed.tell(CloseGenBatch())
    assert replayed.error == "max_num_gen_batches"
    replayed.error = None
    replayed.arrive("b", kept=True)
    replayed.tell(CloseGenBatch())
    assert replayed.error is None
    assert [replayed.names[group.group_id] for group in replayed.state.queued] == ["b"]
