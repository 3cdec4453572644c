"""What stays in memory of the groups that have arrived, and what of it a batch is made of."""

import numpy as np

from asyncdapo.messages import Group
from asyncdapo.replay.core.events import MoveGroup
from asyncdapo.replay.server.shares import RecentGroups
from asyncdapo.shares import CutWanted
from asyncdapo.transport.payload import Payload
from tests.replay.small_run import SmallRun


def arrived(group_id, num_tokens=10):
    group = Group(
        prompt_id=group_id,
        lease_id=group_id,
        branch=0,
        attempt=1,
        worker=0,
        num_prompt_tokens=0,
        completions=[],
        generate_s=1.0,
    )
    nothing = np.empty(0, np.int32)
    return group, Payload(nothing, np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.float32))


def moved(group_id, state):
    return MoveGroup(group_id=group_id, prompt_id=group_id, state=state, verdict="kept")


def test_a_group_stays_until_it_is_trained_on():
    recent, group = RecentGroups(limit_bytes=1000), arrived(1)
    recent.move(moved(1, "queued"), group)
    recent.move(moved(1, "cut"), arrived(2))
    assert recent.get(1) is group
    recent.move(moved(1, "trained"), None)
    assert recent.get(1) is None


def test_a_group_that_is_never_trained_on_does_not_stay():
    recent = RecentGroups(limit_bytes=1000)
    recent.move(moved(1, "filtered"), arrived(1))
    assert recent.get(1) is None


def test_what_has_no_room_does_not_stay_and_what_leaves_makes_room():
    recent = RecentGroups(limit_bytes=100)  # a group of ten tokens has 80
    for group_id in (1, 2):
        recent.move(moved(group_id, "queued"), arrived(group_id))
    assert [bool(recent.get(group_id)) for group_id in (1, 2)] == [True, False]
    recent.move(moved(1, "cut"), arrived(1))
    recent.move(moved(1, "trained"), None)
    recent.move(moved(3, "queued"), arrived(3))
    assert recent.get(3)


def share_of_the_first_batch(run):
    """Header and bytes."""
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    batch, frames = run.dispatch.answers.get_nowait().read()
    return batch, [bytes(frame) for frame in frames]


def test_a_batch_is_the_same_from_memory_and_from_the_disk(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.fill(0)
    from_memory = share_of_the_first_batch(run)
    run.journal.close()
    assert share_of_the_first_batch(SmallRun(tmp_path)) == from_memory
