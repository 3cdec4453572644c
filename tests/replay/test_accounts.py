"""The accounts: what they say of groups while a batch is waited for."""

from __future__ import annotations

from asyncdapo.messages import Completion, Group
from asyncdapo.replay.accounts import Accounts
from asyncdapo.replay.events import MoveGroup
from asyncdapo.replay.recovery import Recovered


def group(number: int, *accs: float) -> Group:
    completions = [
        Completion(
            num_tokens=3,
            finish_reason="stop",
            versions=[(0, 3)],
            loss_mask=[(1, 3)],
            reward=acc,
            metrics={"acc": acc},
        )
        for acc in accs
    ]
    return Group(
        prompt_id=number,
        lease_id=number,
        branch=0,
        attempt=1,
        worker=0,
        num_prompt_tokens=4,
        completions=completions,
        generate_s=0.1,
    )


def test_what_the_filter_drops_is_said_once_it_is_much() -> None:
    accounts = Accounts({}, Recovered())
    for number, (state, *accs) in enumerate(
        [("filtered", 1.0, 1.0), ("queued", 0.0, 1.0), ("filtered", 0.0, 0.0), ("filtered", 1.0, 1.0)], 1
    ):
        verdict = "kept" if state == "queued" else "constant"
        move = MoveGroup(group_id=number, prompt_id=number, state=state, verdict=verdict)
        accounts.move_group(move, group(number, *accs))
    assert accounts.describe_filtered(4) == ""
    assert accounts.describe_filtered(3) == "3 groups filtered since the last batch: 2 all right, 1 all wrong"
