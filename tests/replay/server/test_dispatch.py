"""The dispatch without sockets: commit before send, batches, and what the accounts say."""

import errno
import os

import pytest

from asyncdapo.errors import ConfigError, DiskError
from asyncdapo.messages import Ack, Heartbeat, Lease, Progress
from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.ledger import describe_unreadable, place_of
from asyncdapo.replay.server.accounts import TOKEN_ENDS
from asyncdapo.shares import Batch, CutWanted, NoBatch
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
    assert synced == ["000001.bin", "ledger.db-wal"]


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


def test_a_batch_that_cannot_be_read_back_is_said_and_cut_anew_by_a_rollback(tmp_path):
    """A rank may have it already, so it stays as it was cut while a learner lives."""
    run = SmallRun(tmp_path)
    run.join(0)
    run.fill(0)
    run.dispatch.apply(core.BatchWanted(step=1))
    outgoing(run)
    harmed, whole = (group.group_id for group in run.state.cut_batches.untrained[1])
    segment = tmp_path / "payloads" / "000001.bin"
    place = place_of(run.journal._db, harmed)
    content = bytearray(segment.read_bytes())
    content[place.end - 1] ^= 1
    segment.write_bytes(content)
    for _ in range(2):
        run.dispatch.want_batch(b"learner", CutWanted(step=1))
        [answer] = run.answers()
        assert (type(answer), answer.unreadable) == (NoBatch, True)
        assert answer.reason.startswith("batch 1 can't be read back: payloads/000001.bin, record at 0: its tokens are")
    run.roll_back(0)
    assert [group.group_id for group in run.state.held.queued] == [whole]
    assert f"group {harmed} (payloads/000001.bin, record at 0: its tokens are" in describe_unreadable(
        tmp_path, branch=1
    )
    run.fill(0)
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    [batch] = run.answers()
    assert isinstance(batch, Batch)
    assert whole in [group.lease_id for group in batch.groups]
    assert place_of(run.journal._db, batch.groups[-1].lease_id).segment > 1  # whatever harmed the old one


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


def test_means_are_over_the_groups_since_the_last_step(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.ready(0, 4)
    run.answer(run.running(0)[0], accs=(1.0, 1.0))
    run.fill(0)
    run.train(1)
    run.fill(0, versions=((1, 4),))
    run.train(2)
    first, second = run.lines
    assert (first["reward/mean"], second["reward/mean"]) == (1 / 3, 0.0)
    assert (first["filter/kept_ratio"], second["filter/kept_ratio"]) == (2 / 3, 1.0)
    assert (first["filter/all_correct_ratio"], second["filter/all_correct_ratio"]) == (1 / 3, 0.0)


def test_groups_on_which_the_reward_function_raised_have_a_ratio_of_their_own(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    failed, *leases = run.ready(0, 3)
    run.dispatch.apply(core.LeaseFailed(lease_id=failed), detail="LookupError")
    for lease_id in leases:
        run.answer(lease_id)
    run.train(1)
    run.fill(0, versions=((1, 4),))
    run.train(2)
    first, second = run.lines
    assert (first["reward/failed_ratio"], first["rollout/arrived_groups"]) == (1 / 3, 3)
    assert first["filter/kept_ratio"] == 1.0
    assert second["reward/failed_ratio"] == 0.0


def test_a_step_whose_batch_had_all_arrived_before_repeats_the_means(tmp_path):
    run = SmallRun(tmp_path, max_staleness=3, run_ahead=2)
    run.join(0)
    for lease_id in run.ready(0, 6)[:4]:
        run.answer(lease_id)
    run.train(1)
    run.train(2)
    assert run.lines[1]["reward/mean"] == run.lines[0]["reward/mean"]
    assert run.lines[1]["replay/staleness_mean"] == 1.0


def test_every_sampled_token_is_accounted_for(tmp_path):
    """Groups of 8 tokens: 6 trained, 1 filtered; a withdrawn and a lost lease with 5 and 3 tokens so far."""
    run = SmallRun(tmp_path)
    for worker in range(3):
        run.join(worker)
    run.ready(0, 2)
    [slow], [lost] = run.ready(1, 1), run.ready(2, 1)
    for worker, progress in ((1, {slow: 5}), (2, {lost: 3})):
        held = {lease_id: Progress(num_tokens=tokens, phase="sampling") for lease_id, tokens in progress.items()}
        beat = Heartbeat(asked=1, loaded_version=0, branch=0, progress=held, evaluations=[], gauges={"tokens": 50.0})
        run.sessions.note_heartbeat(run.sessions.of_worker(worker), beat)
    run.dispatch.apply(core.SamplingBegan(lease_id=slow, version=0))
    run.dispatch.apply(core.WorkerLost(worker=2))
    run.answer(run.running(0)[0], accs=(0.0, 0.0))
    run.advance(0, 1, 2, 3)
    last = run.lines[-1]
    assert {end: last[f"replay/tokens_{end}"] for end in TOKEN_ENDS} == {
        "trained": 48,
        "filtered": 8,
        "expired": 0,
        "surplus": 0,
        "undone": 0,
        "dropped": 0,
        "failed": 0,
        "withdrawn": 5,
        "lost": 3,
        "evaluation": 0,
    }
    assert last["rollout/withdrawn_leases"] == 1
    assert last["replay/dropped_ratio"] == 1 / 8
    assert run.sessions.total("tokens") == 100


def test_tokens_of_a_former_session_stay_counted(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0, session="old")
    beat = Heartbeat(asked=0, loaded_version=0, branch=0, progress={}, evaluations=[], gauges={"tokens": 30.0})
    run.sessions.note_heartbeat(run.sessions.of_worker(0), beat)
    run.dispatch.apply(core.WorkerLost(worker=0))
    run.join(0, session="new")
    assert run.sessions.total("tokens") == 30


# ------------------------------------------------------------------------------------------------------------ counters

COUNTERS = ("filter/gen_batches", "filter/prompts_consumed", "replay/train_steps")


def counters(run):
    return tuple(run.lines[-1][name] for name in COUNTERS)


def test_counters_say_what_the_run_has_used_up_so_far(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.ready(0, 4)
    run.answer(run.running(0)[0], accs=(1.0, 1.0))
    run.fill(0)
    run.train(1)
    assert counters(run) == (1, 3, 1)
    run.advance(0, 2)
    assert counters(run) == (2, 5, 2)


def test_counters_leave_out_a_group_that_came_too_late_for_a_verdict(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    [slow] = run.ready(0, 1)
    run.join(1)
    run.advance(1, 1, 2)
    run.answer(slow)
    run.advance(1, 3)
    assert counters(run) == (3, 6, 3)


def test_counters_continue_over_a_new_server_and_back_with_a_rollback(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    run.advance(0, 1, 2, 3)
    assert counters(run) == (3, 6, 3)
    run.journal.close()
    again = SmallRun(tmp_path)
    again.leases, again.lines = run.leases, run.lines
    again.roll_back(1)
    again.train(2)
    assert counters(again) == (2, 4, 2)
    again.advance(0, 3)
    assert counters(again) == (3, 6, 3)


# ------------------------------------------------------------------------------------------------ metric of the filter


def test_the_filter_compares_any_number_of_the_reward(tmp_path):
    run = SmallRun(tmp_path, filter=FilterConfig(metric="bleu"))
    run.join(0)
    same, different = run.ready(0, 2)
    run.answer(same, bleu=(0.25, 0.25))
    run.answer(different, accs=(0.0, 0.0), bleu=(0.25, 0.5))
    assert [group.group_id for group in run.state.held.queued] == [different]


def test_a_number_that_a_completion_lacks_ends_the_run_with_those_that_all_have(tmp_path):
    run = SmallRun(tmp_path, filter=FilterConfig(metric="bleu"))
    run.join(0)
    [lease_id] = run.ready(0, 1)
    with pytest.raises(ConfigError) as caught:
        run.answer(lease_id, style=(0.5, 0.5))
    assert str(caught.value) == (
        "filter.metric: a group's completions don't all have this metric, got 'bleu' "
        "(they have: acc, score, seq_reward, style)"
    )


def test_all_correct_and_all_wrong_go_by_acc_whatever_the_filter_compares(tmp_path):
    run = SmallRun(tmp_path, filter=FilterConfig(metric="bleu"), run_ahead=2, max_staleness=2)
    run.join(0)
    right, wrong, mixed, partly = run.ready(0, 4)
    run.answer(right, accs=(1.0, 1.0), bleu=(0.25, 0.5))
    run.answer(wrong, accs=(0.0, 0.0), bleu=(0.25, 0.5))
    run.answer(mixed, accs=(1.0, 0.0), bleu=(0.25, 0.25))
    run.answer(partly, accs=(0.5, 0.5), bleu=(0.25, 0.25))
    run.train(1)
    [line] = run.lines
    assert (line["filter/all_correct_ratio"], line["filter/all_wrong_ratio"]) == (0.25, 0.25)
    assert line["filter/kept_ratio"] == 0.5


def test_the_truncated_ratio_counts_completions_that_were_cut_off(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0)
    first, second = run.ready(0, 2)
    run.answer(first, finish="length")
    run.answer(second)
    run.train(1)
    assert run.lines[0]["rollout/truncated_ratio"] == 0.5
