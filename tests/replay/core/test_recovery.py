"""Reloads of a small run: what is there again."""

from dataclasses import replace

from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.batch import HeldGroup
from asyncdapo.replay.core.recovery import KnownWorker, Recovered, Totals
from asyncdapo.replay.ledger.journal import Journal
from tests.replay.small_run import SmallRun, trained_run


def test_a_fresh_ledger_has_nothing_to_resume_from(tmp_path):
    recovered = Journal(tmp_path).recover()
    assert replace(recovered, totals=Totals()) == Recovered()
    assert not any(recovered.totals.tokens.values())


def test_a_reload_knows_workers_leases_and_the_queue(tmp_path):
    run = SmallRun(tmp_path)
    run.join(0, session="a")
    run.join(1, session="b")
    kept, running = run.ready(0, 2)
    run.answer(kept)
    run.dispatch.apply(core.SamplingBegan(lease_id=running, version=0))
    run.dispatch.apply(core.WorkerLost(worker=1))
    recovered = run.journal.recover()
    assert recovered.workers == {0: KnownWorker(session="a", loaded_version=0)}
    [lease] = recovered.leases
    assert (lease.lease_id, lease.session, lease.attempt, lease.started_version) == (running, "a", 1, 0)
    [group] = recovered.queued
    assert (group.group_id, recovered.facts[kept].num_tokens) == (kept, 8)
    assert recovered.first_lease_at_s is not None


def test_the_keep_rate_is_that_of_the_verdicts_before(tmp_path):
    run = SmallRun(tmp_path, max_staleness=9, run_ahead=9)
    run.join(0)
    for number, lease_id in enumerate(run.ready(0, 10)):
        run.answer(lease_id, accs=(1.0, number % 2))
    rate = run.state.keep_rate.value
    assert rate < 0.7
    assert run.make_state(run.journal.recover()).keep_rate.value == rate


def test_a_run_that_was_stopped_stays_so_with_its_reason(tmp_path):
    run = SmallRun(tmp_path, filter=FilterConfig(max_gen_batches=1))
    run.join(0)
    for lease_id in run.ready(0, 2):
        run.answer(lease_id, accs=(1.0, 1.0))
    recovered = run.journal.recover()
    assert recovered.over
    assert recovered.stop.error
    assert "filter.max_gen_batches: 1 generation batches gave 0" in recovered.stop.reason


def test_the_limit_of_generation_batches_holds_over_a_reload(tmp_path):
    """One verdict of two before it, one after: the generation batch is full, and the only one."""
    run = SmallRun(tmp_path, filter=FilterConfig(max_gen_batches=1))
    run.join(0)
    first, _ = run.ready(0, 2)
    run.answer(first, accs=(1.0, 1.0))
    run.journal.close()
    again = SmallRun(tmp_path, filter=FilterConfig(max_gen_batches=1))
    assert not again.state.over
    again.leases = run.leases
    again.answer(again.running(0)[0], accs=(1.0, 1.0))
    assert again.state.over


def test_what_was_trained_can_be_told_again(tmp_path):
    run = trained_run(tmp_path, 1)
    facts = run.journal.batch_facts(1)
    assert [(fact.num_tokens, fact.num_completions, fact.reward_mean, fact.min_version) for fact in facts] == [
        (8, 2, 0.0, 0)
    ] * 2
    assert run.journal.batch_facts(2) == []


def test_a_prompt_that_comes_back_before_the_verdicts_of_its_step_is_leased_though_they_are_all_there(tmp_path):
    """A rollback at the barrier lost the group of prompt 0; those of 1 and 2 are held: all that the limit allows."""
    run = SmallRun(tmp_path, run_ahead=0.0, filter=FilterConfig(max_gen_batches=1))
    held = [HeldGroup(min_version=0, prompt_id=p, group_id=p + 1, verdict="kept") for p in (1, 2)]
    lost = Recovered(
        num_fresh=3,
        prompts={0: ("waiting", 0), 1: ("queued", 0), 2: ("queued", 0)},
        places={0: 0},
        queued=held,
        num_leases=3,
        workers={0: KnownWorker(session="a", loaded_version=0)},
    )
    state = run.make_state(lost)
    assert state.admits()
    [lease, _] = state.handle(core.Ready(worker=0, credits=2))
    assert lease.prompt_id == 0
    assert not state.admits()
