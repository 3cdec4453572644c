"""What a step's summary says of groups, tokens and events, through the dispatch without sockets."""

import pytest

from asyncdapo.errors import ConfigError
from asyncdapo.messages import Heartbeat, Progress
from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.server.accounts import TOKEN_ENDS
from tests.replay.small_run import SmallRun


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
