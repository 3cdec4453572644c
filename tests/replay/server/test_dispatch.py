"""The dispatch without sockets: commit before send, and batches."""

import errno
import os
import re
import shutil

import pytest

from asyncdapo.errors import BatchError, DiskError
from asyncdapo.messages import Ack, Lease
from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.ledger import describe_unreadable, place_of
from asyncdapo.shares import Batch, CutWanted, NoBatch
from tests.replay.serving import tokens_of
from tests.replay.small_run import SmallRun


class WatchedJournal(Journal):
    """Notes how many messages wait to be sent when a transaction has just been committed."""

    dispatch = None

    def write(self, event, actions, **facts):
        super().write(event, actions, **facts)
        if self.dispatch is not None:
            self.sent_before_commit = self.dispatch.outgoing.qsize()


def outgoing(run):
    letters = []
    while not run.dispatch.outgoing.empty():
        letters.append(run.dispatch.outgoing.get_nowait().message)
    return letters


def name_of(descriptor):
    return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))


def test_nothing_is_sent_before_its_event_is_committed(tmp_path):
    run = SmallRun(tmp_path, make_journal=WatchedJournal)
    run.journal.dispatch = run.dispatch
    run.join(0)

    run.dispatch.apply(core.Ready(worker=0, credits=2))
    assert run.journal.sent_before_commit == 0
    leases = outgoing(run)
    assert [type(message) for message in leases] == [Lease, Lease]
    run.leases |= {lease.lease_id: lease for lease in leases}

    run.messages = lambda: None
    run.answer(leases[0].lease_id)
    assert run.journal.sent_before_commit == 0
    assert outgoing(run) == [Ack(lease_id=leases[0].lease_id)]

    run.answer(leases[1].lease_id)
    outgoing(run)
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    assert run.journal.sent_before_commit == 0
    assert [type(message) for message in run.answers()] == [Batch]


def test_groups_that_come_together_are_one_transaction_which_waits_for_the_disk_once(tmp_path, monkeypatch):
    run = SmallRun(tmp_path)
    run.join(0)
    leases = run.ready(0, 2)
    run.messages = lambda: None
    run.journal.sync()
    synced, commits = [], []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(name_of(descriptor)))
    run.journal._db.set_trace_callback(lambda statement: commits.append(statement) if statement == "COMMIT" else None)
    with run.dispatch.together():
        for lease_id in leases:
            run.answer(lease_id)
        assert not commits
    assert (synced, commits) == ([], ["COMMIT"])
    assert outgoing(run) == [Ack(lease_id=lease_id) for lease_id in leases]
    for _ in range(2):
        run.journal.sync()
    assert sorted(synced) == ["000001.bin", "ledger.db-wal"]  # at once, by two threads


def test_a_disk_that_fails_is_said_to_all_who_wait_for_it(tmp_path, monkeypatch):
    run = SmallRun(tmp_path)
    run.join(0)
    [lease_id] = run.ready(0, 1)
    run.answer(lease_id)

    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", broken)
    for _ in range(2):
        with pytest.raises(DiskError, match=r"ledger\.db: can't be written: Input/output error"):
            run.journal.sync()


def test_of_events_that_fail_together_none_is_answered_and_none_is_in_the_ledger(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    leases = run.ready(0, 2)
    run.messages = lambda: None

    def answer_both():
        with run.dispatch.together():
            for lease_id in leases:
                run.answer(lease_id)
            raise DiskError("full")

    with pytest.raises(DiskError, match="full"):
        answer_both()
    assert outgoing(run) == []
    assert run.journal.recover().queued == []


@pytest.mark.parametrize(("at", "what"), [(30, "header is"), (-1, "tokens are")])
def test_a_batch_that_cannot_be_read_back_is_said_and_cut_anew_by_a_rollback(tmp_path, at, what):
    """A rank may have it already, so it stays as it was cut while a learner lives. What is wrong with a header is said
    by the server, what is wrong with tokens is found by the rank that reads them."""
    run = SmallRun(tmp_path)
    run.join(0)
    run.fill(0)
    run.dispatch.apply(core.BatchWanted(step=1))
    outgoing(run)
    harmed, whole = (group.group_id for group in run.state.cut_batches.untrained[1])
    segment = tmp_path / "payloads" / "000001.bin"
    place = place_of(run.journal._db, harmed)
    content = bytearray(segment.read_bytes())
    content[place.end + at if at < 0 else place.offset + at] ^= 1
    segment.write_bytes(content)
    run.journal.close()
    run = SmallRun(tmp_path)  # the former one has the header in memory
    said = rf"batch 1 can't be read back.*: payloads/000001\.bin, record at 0: its {what} damaged"
    for _ in range(2):
        run.dispatch.want_batch(b"learner", CutWanted(step=1))
        [answer] = run.answers()
        if isinstance(answer, NoBatch):
            assert answer.unreadable
            assert re.match(said, answer.reason)
        else:
            with pytest.raises(BatchError, match=said):
                tokens_of(tmp_path, answer)
    run.roll_back(0)
    assert [group.group_id for group in run.state.held.queued] == [whole]
    assert f"group {harmed} (payloads/000001.bin, record at 0: its {what}" in describe_unreadable(tmp_path, branch=1)
    run.fill(0)
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    [batch] = run.answers()
    assert isinstance(batch, Batch)
    assert whole in [group.lease_id for group in batch.groups]
    assert place_of(run.journal._db, batch.groups[-1].lease_id).segment > 1  # whatever harmed the old one


def test_a_batch_whose_records_gave_way_to_those_of_others_is_not_sent_and_cut_anew_by_a_rollback(tmp_path):
    """The payloads are deleted under a server that dies later: the next one begins with segment 1 again, and its
    records may stand where those of a batch stood."""
    run = SmallRun(tmp_path)
    run.join(0)
    run.fill(0)
    run.dispatch.apply(core.BatchWanted(step=1))
    lost = [group.group_id for group in run.state.cut_batches.untrained[1]]
    places = run.journal.places(lost)
    run.journal.close()
    shutil.rmtree(tmp_path / "payloads")
    leases, run = run.leases, SmallRun(tmp_path)
    run.leases |= leases
    run.fill(0)
    newer = [group.group_id for group in run.state.held.queued]
    assert run.journal.places(newer) == places
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    [answer] = run.answers()
    assert isinstance(answer, NoBatch)
    assert f"it is of group {newer[0]}, not of group {lost[0]}" in answer.reason
    run.roll_back(0)
    assert [group.group_id for group in run.state.held.queued] == newer


def test_a_batch_that_is_trained_is_forgotten(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.fill(0)
    run.train(1)
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    assert run.answers() == []


def test_a_batch_cut_at_the_limit_is_sent_when_it_is_wanted_and_not_before(tmp_path):
    run = SmallRun(tmp_path, filter=FilterConfig(max_gen_batches=1, on_limit="partial"))
    run.join(0)
    run.fill(0)
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    run.messages()
    run.answers()
    for accs in ((1.0, 0.0), (1.0, 1.0)):
        run.ready(0, 4)
        run.answer(run.running(0)[0], accs=accs)
    assert run.state.next_batch.step == 3
    run.ready(0, 4)
    assert run.answers() == []
    run.dispatch.want_batch(b"learner", CutWanted(step=2))
    [batch] = run.answers()
    assert (batch.step, len(batch.groups)) == (2, 1)
