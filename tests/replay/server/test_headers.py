"""Which headers stay in memory, and what a batch is made of."""

from types import SimpleNamespace

import pytest

from asyncdapo.messages import Group
from asyncdapo.records.record import BadRecord, Place
from asyncdapo.replay.core.events import MoveGroup
from asyncdapo.replay.server.headers import Headers
from asyncdapo.shares import Batch, CutWanted, Deal, Dealer, NoBatch
from tests.replay.small_run import SmallRun


def arrived(group_id):
    return Group(
        prompt_id=group_id,
        lease_id=group_id,
        branch=0,
        attempt=1,
        worker=0,
        num_prompt_tokens=0,
        completions=[],
        generate_s=1.0,
    )


def moved(group_id, state):
    return MoveGroup(group_id=group_id, prompt_id=group_id, state=state, verdict="kept")


def unreadable(group_id, place):
    raise BadRecord(f"segment {place.segment}: gone")


@pytest.fixture
def headers():
    """On a disk that has lost everything."""
    return Headers(SimpleNamespace(read_header=unreadable), Dealer())


def batch_of(headers, *group_ids):
    bare = Batch(step=1, branch=0, max_staleness=0, groups=[], deal=Deal(updates=[], ranks=[]))
    return headers.batch(bare, {group_id: Place(group_id, 0, 1) for group_id in group_ids})


def test_a_header_stays_until_its_group_is_trained_on(headers):
    headers.move(moved(1, "queued"), arrived(1))
    headers.move(moved(1, "cut"), arrived(2))
    headers.move(moved(2, "queued"), arrived(2))
    batch = batch_of(headers, 1, 2)
    assert batch.groups == [arrived(1), arrived(2)]
    assert batch.places == [Place(1, 0, 1), Place(2, 0, 1)]
    headers.move(moved(1, "trained"), None)
    assert headers._held == {2: arrived(2)}


def test_the_header_of_a_group_that_is_never_trained_on_does_not_stay(headers):
    headers.move(moved(1, "filtered"), arrived(1))
    assert headers._held == {}


def test_a_batch_with_a_header_that_cannot_be_read_is_said_to_be_unreadable(headers):
    headers.move(moved(1, "queued"), arrived(1))
    said = NoBatch(step=1, reason="batch 1 can't be read back: segment 2: gone", unreadable=True)
    assert batch_of(headers, 1, 2) == said
    headers.move(moved(2, "queued"), arrived(2))
    assert isinstance(batch_of(headers, 1, 2), Batch)


def first_batch(run):
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    [batch] = run.answers()
    return batch


def test_a_batch_is_the_same_from_memory_and_from_the_disk(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.fill(0)
    from_memory = first_batch(run)
    run.journal.close()
    assert first_batch(SmallRun(tmp_path)) == from_memory
